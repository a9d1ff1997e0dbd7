"""Package layout: each room is a top-level folder, imported as ``distrain.<room>``."""

from setuptools import find_packages, setup

ROOMS = ("launch", "checkpoint", "faults", "planners")

packages = find_packages(include=["distrain", "distrain.*"])
for room in ROOMS:
    packages += [f"distrain.{room}", *(f"distrain.{room}.{sub}" for sub in find_packages(room))]

setup(packages=packages, package_dir={f"distrain.{room}": room for room in ROOMS})
