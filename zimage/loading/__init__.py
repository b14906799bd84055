"""From files to modules in memory: finding, checking, planning, loading and releasing them."""
