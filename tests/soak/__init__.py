"""A load with checks (`load`, `checks`, `recording`), programs that die under it (`chaos`), and the tests that run for long.

`pytest -m soak tests/soak` runs those; tests/e2e has shorter ones of the same parts.
"""
