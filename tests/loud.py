"What a test lacks is never passed over in silence"
import os
import warnings

import pytest


def absent(what, need=bool(os.environ.get("CI"))):
    "In CI everything is there that a test needs; elsewhere it is said loudly that it is not"
    if need: pytest.fail(what)
    warnings.warn(f"NOT TESTED: {what}")
    pytest.skip(what)


def unbuilt(what):
    "What needs the built site fails without it only in the workflow that builds it: the other jobs have other Pythons than it is built on"
    absent(what, need=bool(os.environ.get("SITE")))
