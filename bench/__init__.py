"""What a render costs, measured beside the references. `python -m bench --help` to begin with."""
