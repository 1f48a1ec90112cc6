"""Hydra's part: find the config files, choose one per group, and merge them into one tree.

Hydra's loader is driven directly, without its global state, so that several configs can be composed in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

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
        return sorted(self._list("", ObjectType.CONFIG))

    def groups(self) -> list[str]:
        """Names of the groups, nested ones with a slash."""
        found: list[str] = []
        todo = [name for name in self._list("", ObjectType.GROUP) if name != "hydra"]
        while todo:
            group = todo.pop(0)
            if self.choices(group):
                found.append(group)
            todo += [f"{group}/{name}" for name in self._list(group, ObjectType.GROUP)]
        return sorted(found)

    def choices(self, group: str) -> list[str]:
        """Names of the configs in a group."""
        return sorted(self._list(group, ObjectType.CONFIG))

    def defaults(self, root: str) -> dict[str, str | None]:
        """The groups that `root` names in its defaults list, with the choice made there."""
        if root not in self.roots():
            return {}
        return dict(reversed(self._defaults_list(root, []).overrides.known_choices.items()))

    def compose(self, root: str, choices: list[str]) -> DictConfig:
        """The merged tree of `root` under Hydra group overrides.

        A root without a YAML file starts from an empty tree: the schema's defaults then say everything.
        """
        name = root if root in self.roots() else None
        tree = self._readable(lambda: self._loader.load_configuration(name, choices, RunMode.RUN, from_shell=False))
        OmegaConf.set_struct(tree, False)
        tree.pop("hydra")
        return tree

    def files(self, root: str, choices: list[str]) -> list[ConfigFile]:
        """The files of a composition, in the order in which they are merged."""
        return [self._file(entry) for entry in self._defaults_list(root, choices).defaults]

    def _list(self, group: str, kind: ObjectType) -> list[str]:
        return [name for name in self._loader.repository.get_group_options(group, kind) if not name.startswith("_")]

    def _defaults_list(self, root: str, choices: list[str]) -> DefaultsList:
        overrides = OverridesParser.create().parse_overrides(choices)
        repository = CachingConfigRepository(self._loader.repository)
        name = root if root in self.roots() else None
        return self._readable(
            lambda: create_defaults_list(repository, name, overrides, prepend_hydra=False, skip_missing=False)
        )

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
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    cause = error.__cause__
    return f"{text} ({one_line(cause)})" if cause is not None and str(cause) not in text else text
