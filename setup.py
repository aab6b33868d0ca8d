"""Gives the package the README as its description, without the pictures, which are not in the package."""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md").read_text("utf-8")
PICTURE = re.compile(r"^!\[[^]]*\]\(docs/[^)]*\)\n\n?", re.MULTILINE)

setup(long_description=PICTURE.sub("", README), long_description_content_type="text/markdown")
