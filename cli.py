"""`python cli.py …` from a clone; the same commands as `zimage …` once installed."""

import importlib.util
import sys

if __name__ == "__main__":
    try:
        needed = ("click", "torch", "safetensors", "tokenizers", "numpy", "PIL", "yaml", "zimage.weights")
        missing = next((name for name in needed if importlib.util.find_spec(name) is None), None)
        if missing:
            sys.exit(f"error: not installed yet ({missing} is missing); run: pip install -c constraints.txt -e .")
        from zimage.__main__ import main
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
