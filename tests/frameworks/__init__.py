"""Other people's training code, as they ship it, with and without the package: `python tests/frameworks.py`."""
