"""What a render costs, measured beside the references; `python -m bench --help` lists the scenarios."""
