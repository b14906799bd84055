"""What a render costs, measured beside the references. `python -m bench.full_size --help` to begin with."""
