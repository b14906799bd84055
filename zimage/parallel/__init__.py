"""One job on several ranks: sequence parallelism, guidance on two halves of the ranks, a divided decode."""
