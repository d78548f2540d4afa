"""Plugins that a test installs into this process and that are gone afterwards."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from types import SimpleNamespace

import pytest

from tokenreduce.plugins import Plugins, PluginStatus, installed
from tokenreduce.registry import Registry

Install = Callable[..., PluginStatus]


@pytest.fixture
def install() -> Iterator[Install]:
    """A function that loads hook implementations as a plugin of this process."""
    plugins = installed()
    loaded: list[PluginStatus] = []

    def install_plugin(**hooks: object) -> PluginStatus:
        status = plugins.load("acme", SimpleNamespace(**hooks), distribution="acme 1.0")
        loaded.append(status)
        return status

    yield install_plugin
    for status in loaded:
        plugins.statuses.remove(status)
        for registry, name in registered(plugins, status):
            registry.remove(name)


def registered(plugins: Plugins, status: PluginStatus) -> list[tuple[Registry, str]]:
    """The registries and names behind a status."""
    registries = [
        value for f in fields(plugins) if isinstance(value := getattr(plugins, f.name), Registry)
    ]
    return [
        (registry, entry.removeprefix(f"{registry.kind} "))
        for entry in status.registered
        for registry in registries
        if entry.startswith(f"{registry.kind} ")
    ]
