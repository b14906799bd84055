"""How often each row was begun: a small actor of its own, which outlives the workers that rows may kill."""

from collections import Counter

MOST = 3


class Attempts:
    """Counts of attempts, and what the last one of a row failed with."""

    def __init__(self) -> None:
        self._begun, self._errors = Counter[str](), dict[str, str]()

    def begin(self, key: str) -> tuple[int, str]:
        """Count one more attempt; returns how many there are with it, and the last error that was noted."""
        self._begun[key] += 1
        return self._begun[key], self._errors.get(key, "")

    def failed(self, key: str, error: str) -> None:
        """Note what an attempt failed with."""
        self._errors[key] = error
