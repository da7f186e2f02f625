"""The families of models that can be trained, each a file of this folder: docs/families.md says how to add one.

Imports neither torch nor transformers until a family is loaded, so that a command line is parsed and checked at once.
"""

import importlib
import pkgutil


def family_names() -> tuple[str, ...]:
    """The model_type, in config.json, of each family: the names of the files beside base.py."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))


def load_family(name: str):
    """The `grpo.families.base.Family` of a model_type among `family_names`."""
    return importlib.import_module(f"{__name__}.{name}").FAMILY
