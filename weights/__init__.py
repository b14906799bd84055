"""Published weights: fetched, verified and converted; DEMO is the folder of the bundled model."""

from pathlib import Path

DEMO = Path(__file__).parent / "demo"
