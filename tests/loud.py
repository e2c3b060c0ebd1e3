"What a test lacks is never passed over in silence"
import os
import warnings

import pytest


def absent(what):
    "In CI everything is there that a test needs; elsewhere it is said loudly that it is not"
    if os.environ.get("CI"): pytest.fail(what)
    warnings.warn(f"NOT TESTED: {what}")
    pytest.skip(what)
