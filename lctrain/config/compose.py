"""Hydra's part: find the config files, choose one per group, and merge them into one tree.

Hydra's loader is driven directly, without its global state, so that several configs can be composed in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.default_element import ResultDefault
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lctrain.errors import UserError

PACKAGE = "lctrain.configs"


class ConfigFile(NamedTuple):
    """One YAML file of a composition: where it is, the dotted place it fills, and what it says there."""

    name: str
    package: tuple[str, ...]
    content: Any


class Library:
    """The configs that can be chosen: the package's own, and those of the user's folder, which come first."""

    def __init__(self, config_dir: str | None = None) -> None:
        Plugins.instance()  # registers Hydra's readers of files and packages
        path = ConfigSearchPathImpl()
        path.append("hydra", "pkg://hydra.conf")
        if config_dir is not None:
            if not Path(config_dir).is_dir():
                raise UserError(f"--config-dir {config_dir} is not a folder")
            path.append("user", f"file://{Path(config_dir).resolve()}")
        path.append("main", f"pkg://{PACKAGE}")
        path.append("schema", "structured://")
        self._folder = config_dir
        self._loader = ConfigLoaderImpl(path)

    def roots(self) -> list[str]:
        """Configs that a command composes."""
        return sorted(name for name in self._loader.get_group_options("") if name != "hydra")

    def groups(self) -> list[str]:
        """Names of the groups, nested ones with a slash."""
        found: list[str] = []
        todo = [name for name in self._loader.list_groups("") if name != "hydra" and not name.startswith("_")]
        while todo:
            group = todo.pop(0)
            if self.choices(group):
                found.append(group)
            todo += [f"{group}/{name}" for name in self._loader.list_groups(group) if not name.startswith("_")]
        return sorted(found)

    def choices(self, group: str) -> list[str]:
        """Names of the configs in a group."""
        return sorted(self._loader.get_group_options(group))

    def defaults(self, root: str) -> dict[str, str | None]:
        """The groups that `root` names in its defaults list, with the choice made there."""
        if root not in self.roots():
            return {}
        known = self._readable(lambda: self._loader.compute_defaults_list(root, [], RunMode.RUN)).overrides.known_choices
        return {group: choice for group, choice in reversed(known.items()) if not group.startswith("hydra/")}

    def compose(self, root: str, choices: list[str]) -> tuple[DictConfig, list[ConfigFile]]:
        """The merged tree of `root` under Hydra group overrides, and its files in the order in which they were merged.

        A root without a YAML file starts from an empty tree: the schema's defaults then say everything.
        """
        name = root if root in self.roots() else None
        tree = self._readable(lambda: self._loader.load_configuration(name, choices, RunMode.RUN, from_shell=False))
        OmegaConf.set_struct(tree, False)
        tree.pop("hydra")
        merged = self._loader.compute_defaults_list(name, choices, RunMode.RUN).defaults
        return tree, [self._file(entry) for entry in merged if not str(entry.config_path).startswith("hydra/")]

    def _file(self, entry: ResultDefault) -> ConfigFile:
        assert entry.config_path is not None
        loaded = self._loader.repository.load_config(entry.config_path)
        assert loaded is not None
        folder = self._folder if loaded.provider == "user" else "configs"
        package = tuple(entry.package.split(".")) if entry.package else ()
        content = OmegaConf.to_container(loaded.config, resolve=False)
        return ConfigFile(f"{str(folder).rstrip('/')}/{entry.config_path}.yaml", package, content)

    @staticmethod
    def _readable(action: Any) -> Any:
        try:
            return action()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UserError(one_line(error)) from None


def one_line(error: BaseException) -> str:
    """The telling part of a library's multi-line message."""
    if isinstance(error, YAMLError) and getattr(error, "problem_mark", None) is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    cause = error.__cause__
    return f"{text} ({one_line(cause)})" if cause is not None and str(cause) not in text else text
