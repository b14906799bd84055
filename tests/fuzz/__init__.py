"""Mutated inputs of every kind, seeded: a module per kind, whose `cases` are run by `ring.py`.

A module has `cases(chance, folder)`, which yields pairs for as long as it has any: what was mutated, and a call that
hands the mutated input to a public entry. The call may raise a ZImageError of one line, or return; an int is taken
as the status of a command.
"""
