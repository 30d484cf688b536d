"""Gives the checks of every_layout.py the writers and variants of the class that inherits them."""


def pytest_generate_tests(metafunc):
    for name, source in (("write", "WRITERS"), ("variant", "UNSUPPORTED")):
        if name in metafunc.fixturenames and hasattr(metafunc.cls, source):
            cases = getattr(metafunc.cls, source)
            metafunc.parametrize(name, cases, ids=lambda case: getattr(case, "__name__", None))
