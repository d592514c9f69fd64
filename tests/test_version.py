from importlib.metadata import version

import upweight


def test_package_and_metadata_name_the_same_version():
    assert upweight.__version__ == version("upweight")
