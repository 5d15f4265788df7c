"""Combine a run's settings from their sources: recipes, other YAML files, and flags.

A later source wins over an earlier one: the field's default; the recipe (its section `all`, then the model's own below
`models`, or `other` for a model that the recipe does not name); the file of --config; the flags.
"""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from fashion_ddp.config import Config, convert, field_types
from fashion_ddp.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"
USUAL_LR = {"sgd": 0.1, "momentum": 0.01, "adam": 0.001, "adamw": 0.001, "muon": 0.03}


def read_mapping(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Read a YAML file. Returns it as nested mappings, and the line of each key.

    Raises UserError, with file and line, for what cannot be read or holds no mapping.
    """
    return _parse(path, _read(path))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parse(path: Path, text: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        root, data = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML: {problem}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected `name: value` lines, as config.yaml of any run folder shows")
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.MappingNode, above: tuple[str, ...]) -> None:
        for key, value in node.value:
            here, where = (*above, str(key.value)), f"{path}:{key.start_mark.line + 1}"
            if key.tag != "tag:yaml.org,2002:str":  # YAML 1.1 reads `yes` as true, and `<<` as another mapping's keys
                raise UserError(f"{where}: {key.value!r} is no name of a setting")
            if here in lines:
                raise UserError(f"{where}: {key.value!r} is set twice; keep one")
            lines[here] = key.start_mark.line + 1
            if isinstance(value, yaml.MappingNode):
                walk(value, here)

    walk(root, ())
    return data, lines


def read_section(
    path: Path, data: Any, lines: dict[tuple[str, ...], int], above: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Convert one mapping of a YAML file to settings of their fields' types. `above` are the keys that it lies below.

    Raises UserError, with file and line, for an unknown key or a wrong value.
    """
    if data is None:
        return {}
    names = [f.name for f in dataclasses.fields(Config)]
    if not isinstance(data, dict):
        raise UserError(f"{path}:{lines[above]}: {'.'.join(above)} must hold `name: value` lines, got {data!r}")
    settings = {}
    for name, value in data.items():
        where = f"{path}:{lines[(*above, str(name))]}"
        if name not in names:
            raise UserError(f"{where}: unknown key {name!r}; {nearest(str(name), names)}")
        if above and name in ("model", "recipe"):
            raise UserError(f"{where}: a recipe cannot choose the {name} that it is for: give --{name}")
        try:
            settings[name] = convert(name, value, field_types()[name])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return settings


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_settings(recipe: str, model: str) -> dict[str, Any]:
    """Return what a recipe, given by name or by path, sets for a model. Raises UserError for a mistake in it."""
    path = RECIPES / f"{recipe}.yaml"
    if recipe not in recipe_names():
        path = Path(recipe)
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"recipe: unknown {recipe!r}; {nearest(recipe, recipe_names())}, or a path ending in .yaml")
    whole, by_model, other = _read_recipe(path, _read(path))
    return whole | by_model.get(model, other)


@lru_cache(maxsize=32)  # a submission of a thousand runs asks for it thousands of times
def _read_recipe(path: Path, text: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """Return what a recipe sets for all models, for each that it names, and for the others."""
    data, lines = _parse(path, text)
    for key in data:
        if key not in ("all", "models", "other"):
            raise UserError(f"{path}:{lines[(key,)]}: unknown section {key!r}; choices: all, models, other")
    sections = data.get("models") or {}
    if not isinstance(sections, dict):
        raise UserError(f"{path}:{lines[('models',)]}: models must hold one section per model, got {sections!r}")
    # Every section is checked, whichever is used: a mistake shows when the recipe is written, not later.
    by_model = {name: read_section(path, body, lines, ("models", name)) for name, body in sections.items()}
    other = read_section(path, data.get("other"), lines, ("other",))
    return read_section(path, data.get("all"), lines, ("all",)), by_model, other


def make_config(*layers: dict[str, Any]) -> Config:
    """Make a Config from layers of settings on top of the recipe that they name. Later layers win over earlier ones.

    Raises UserError for a layer that changes the optimizer without choosing a rate for it.
    """
    settings = {name: value for layer in layers for name, value in layer.items()}
    recipe = settings.get("recipe", Config.recipe)
    resolved = recipe_settings(recipe, settings.get("model", Config.model))
    resolved.setdefault("reference_batch", resolved.get("batch_size", Config.batch_size))
    for at, layer in enumerate(layers):
        before, after = (s.get("optimizer", Config.optimizer) for s in (resolved, resolved | layer))
        if before != after and not any("lr" in later for later in layers[at:]):
            raise UserError(
                f"lr: {resolved.get('lr', Config.lr)} was chosen for optimizer {before!r}; "
                f"give one for {after!r} with --lr (usual: {USUAL_LR.get(after, 'none')})"
            )
        resolved |= layer
    return Config(**resolved)


def recipe_changes(cfg: Config) -> dict[str, Any]:
    """Return the settings that change the result and differ from the recipe's."""
    usual = make_config({"model": cfg.model, "recipe": cfg.recipe}).result_settings()
    return {name: value for name, value in cfg.result_settings().items() if value != usual.get(name)}
