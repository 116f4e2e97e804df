"""Tools that a user brings: a plain function whose signature is the schema of its arguments.

    def add(left: Annotated[int, "the first number"], right: int = 1, *, unit: str = "") -> str:
        '''Adds two whole numbers.'''

Arguments before the star are the policy's: `str`, `int`, `float`, `bool`, `list`, `list[...]` of these and `Literal[...]` of texts and
whole numbers, with words for the policy in `Annotated`. An argument named `images` gets the conversation's images as a tuple of PIL
images and is not shown. Arguments after the star are options of the recipe. The first paragraph of the docstring describes the tool.

The function returns a text, a number, a PIL image, or a list of these. A `ValueError`, `ArithmeticError` or `LookupError` is its answer to
arguments that it cannot use, and goes to the policy as words. Whatever else it raises or returns, and a call that misses `deadline_s`,
makes the conversation `unavailable`. It runs in threads of the trainer's process, several at a time, and nothing can end it: a late call
runs on.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from ..model.records import DataError, ImagePart
from ..rewards.config import RewardConfigError
from ..rewards.json_answer import Json
from ..rewards.plugin_source import check_options, load_source, nearest
from ..rewards.registry import import_module, permitted, read_source
from .tool import ToolConfigError, ToolResult, ToolUnavailableError, argument_faults, describe, failed, quoted, shorten
from .tool_deadline import DeadlineCalls
from .tools_config import UserToolConfig

IMAGES = "images"
"""Name of the argument that gets the conversation's images."""
_SCALARS: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
_ALLOWED = "str, int, float, bool, list, list[...] of these, or Literal[...] of texts or of whole numbers"


def user_tool(config: UserToolConfig, *, recipe_folder: Path | None, allow_code: bool) -> UserTool:
    """Returns the tool that a recipe names; whatever is wrong with it is a `ToolConfigError`.

    A file may lie in the recipe's folder, or anywhere when `allow_code`, the user's word on the command line, says so; as reward plug-ins.
    """
    try:
        function = _load(config.use, recipe_folder=recipe_folder, allow_code=allow_code)
        options = check_options(config.use, function, config.options, kind="row")
    except RewardConfigError as error:
        # Their messages begin with whose code it is.
        raise ToolConfigError(str(error).replace("reward ", "tool ", 1)) from error
    return UserTool(config, function, options)


def _load(use: str, *, recipe_folder: Path | None, allow_code: bool) -> Callable[..., Any]:
    target, _, name = use.rpartition(":")
    if target.endswith(".py"):
        path = permitted((recipe_folder or Path()) / target, use=use, recipe_folder=recipe_folder, allow_code=allow_code)
        module, _ = load_source(path, read_source(path, use), use=use)
    else:
        module = import_module(target, use=use, recipe_folder=recipe_folder, allow_code=allow_code)
    # Not `vars`: some packages load their parts when they are asked for.
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        functions = [found for found, member in vars(module).items() if inspect.isfunction(member)]
        raise ToolConfigError(
            f"tool {use!r}: {target} has no function {name!r}{nearest(name, functions)}; it has {', '.join(sorted(functions)) or 'none'}"
        )
    return function


class UserTool:
    """A user's function as a tool."""

    def __init__(self, config: UserToolConfig, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._config = config
        self._function = function
        self._options = options
        self.name = function.__name__
        self._place = f"tool {config.use!r}"
        self._call = DeadlineCalls(function, deadline_s=config.deadline_s, place=self._place)
        parameters = self._parameters()
        try:
            annotations = typing.get_type_hints(function, include_extras=True)
        except NameError as error:
            raise ToolConfigError(f"{self._place}: an annotation cannot be resolved ({error}); import the type in its module") from error
        schemas = {name: self._schema(name, parameter, annotations) for name, parameter in parameters.items()}
        self._adapters = {name: TypeAdapter(annotations[name]) for name in parameters}
        self._required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        words = (inspect.getdoc(function) or "").strip().partition("\n\n")[0].replace("\n", " ")
        if not words:
            raise ToolConfigError(f"{self._place}: it has no docstring; write one, its first paragraph tells the policy what the tool does")
        self.description = describe(self.name, words, properties=schemas, required=self._required)

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """Returns the arguments that the policy gives."""
        if inspect.iscoroutinefunction(self._function) or inspect.isgeneratorfunction(self._function):
            raise ToolConfigError(f"{self._place}: it is async or a generator; a tool is a plain function that returns its result")
        parameters = inspect.signature(self._function).parameters
        self._takes_images = IMAGES in parameters
        for name, parameter in parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ToolConfigError(f"{self._place}: argument {name!r} cannot be given by name: leave out *names, **names and /")
        given = {name: parameter for name, parameter in parameters.items() if name != IMAGES}
        return {name: parameter for name, parameter in given.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}

    def _schema(self, name: str, parameter: inspect.Parameter, annotations: Mapping[str, Any]) -> dict[str, Any]:
        if name not in annotations:
            raise ToolConfigError(f"{self._place}: argument {name!r} has no type; it must be {_ALLOWED}")
        annotation, words = annotations[name], []
        if typing.get_origin(annotation) is Annotated:
            annotation, *words = typing.get_args(annotation)
            if len(words) > 1 or not isinstance(words[0], str):
                raise ToolConfigError(f"{self._place}: argument {name!r} is Annotated with {words}; give one text, which describes it")
        schema = _schema_of(annotation)
        if schema is None:
            raise ToolConfigError(f"{self._place}: argument {name!r} is a {inspect.formatannotation(annotation)}; it must be {_ALLOWED}")
        if words:
            schema["description"] = words[0]
        if parameter.default is not parameter.empty:
            try:
                schema["default"] = TypeAdapter(annotation).validate_python(parameter.default, strict=True)
            except ValidationError as error:
                raise ToolConfigError(f"{self._place}: the default of {name!r}, {parameter.default!r}, is not of its type") from error
        return schema

    def run(self, arguments: Mapping[str, Json], *, images: Sequence[ImagePart]) -> ToolResult:
        """Returns what the function returned, as text and images."""
        if fault := argument_faults(arguments, known=tuple(self._adapters), required=self._required):
            return failed(fault)
        given: dict[str, Any] = {}
        for name, value in arguments.items():
            try:
                given[name] = self._adapters[name].validate_python(value, strict=True)
            except ValidationError as error:
                return failed(f"{name} = {quoted(value)}: {error.errors()[0]['msg']}")
        if self._takes_images:
            # Copies: a tool that draws on them must not change what is trained on.
            given[IMAGES] = tuple(part.image.copy() for part in images)
        try:
            returned = self._call(**given, **self._options)
        except ToolUnavailableError:
            raise
        except (ValueError, ArithmeticError, LookupError) as error:
            return failed(shorten(f"{type(error).__name__}: {error}", self._config.max_output_chars))
        except (Exception, SystemExit) as error:  # a stranger's code: it may exit, and has classes of its own
            raise ToolUnavailableError(f"{self._place} broke: {type(error).__name__}: {error}") from error
        return self._result(returned)

    def _result(self, returned: object) -> ToolResult:
        pieces = returned if isinstance(returned, list | tuple) else [returned]
        texts: list[str] = []
        images: list[ImagePart] = []
        for piece in pieces:
            if isinstance(piece, Image.Image):
                images.append(self._part(piece))
            elif isinstance(piece, str | int | float):
                texts.append(str(piece))
            else:
                raise ToolUnavailableError(
                    f"{self._place} returned a {type(piece).__name__}; it must return a text, a number, a PIL image, or a list of these"
                )
        return ToolResult(text=shorten("\n".join(texts), self._config.max_output_chars), images=tuple(images))

    def _part(self, image: Image.Image) -> ImagePart:
        try:
            return ImagePart.from_image(image)
        except DataError as error:
            raise ToolUnavailableError(f"{self._place} returned {error}") from error


def _schema_of(annotation: Any) -> dict[str, Any] | None:  # noqa: ANN401 whatever stands behind a colon
    """Returns the JSON Schema of a type, or None for one that no call can give."""
    if annotation in _SCALARS:
        return {"type": _SCALARS[annotation]}
    if annotation is list:
        return {"type": "array"}
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        items = _schema_of(members[0])
        return None if items is None else {"type": "array", "items": items}
    if typing.get_origin(annotation) is Literal:
        for kind in (str, int):
            if all(type(member) is kind for member in members):
                return {"type": _SCALARS[kind], "enum": list(members)}
    return None
