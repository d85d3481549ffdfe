"""``dmtd serve``: a bundle behind the API that OpenAI's clients speak.

Every option may stand in a YAML file (``--config``) or in the environment (``DMTD_MAX_NUM_SEQS`` is ``--max-num-seqs``):
defaults < file < environment < command line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dmtd_errors.words import reason
from dmtd_runtime.backends.base import BackendOptions
from dmtd_runtime.cli.common import BundleArgument, BundleOption, friendly_errors, note, pick, require
from dmtd_runtime.cli.options.backend import AnswerBackend
from dmtd_runtime.cli.options.server import LimitsGroup, SchedulingGroup, ServerGroup
from dmtd_runtime.cli.places import note_config
from dmtd_runtime.errors import RequestError
from dmtd_runtime.server.options import Limits, ServerOptions
from dmtd_runtime.server.tls import tls_context
from dmtd_runtime.serving.options import ServingOptions

MAX_CONFIG_BYTES = 1 << 20
DEFAULT_SERVING = ServingOptions(max_num_queued_reqs=256, max_num_queued_tokens=1 << 20)
_OF_ONE_START = ("config", "dry_run")


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Make the file's values the defaults of this run."""
    if file is not None and not context.resilient_parsing:
        with friendly_errors({"config": "--config"}, extra="serve"):
            values, keys = _options_of(file, context.command.params)
        context.default_map = {**(context.default_map or {}), **values}
        note_config(context, file, keys)
    return file


def _options_of(file: Path, parameters: Sequence[Any]) -> tuple[dict[str, str | list[str]], dict[str, str]]:
    """Parameter -> value as it is written, and parameter -> key, of a file that names options with hyphens or without."""
    require("serve --config", ("yaml",), "serve")
    import yaml

    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise RequestError(f"{file} is larger than {MAX_CONFIG_BYTES} bytes; is it the right file?", param="config")
        given = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RequestError(f"{file} cannot be read ({reason(error)})", param="config") from None
    if given is not None and given.id != "mapping":
        raise RequestError(f"{file}: got a {given.id}, expected names of options and values", param="config")
    known = {_flag(each): each for each in parameters if each.name not in (*_OF_ONE_START, "help")}
    known |= {str(each.name): each for each in known.values()}
    values: dict[str, str | list[str]] = {}
    keys: dict[str, str] = {}
    for key, node in () if given is None else given.value:
        option = known.get(str(key.value).replace("-", "_"))
        if option is None:
            raise RequestError(f"{file}: {key.value!r} is no option of dmtd serve; see --help", param="config")
        if option.name in keys:
            raise RequestError(f"{file}: {key.value!r} is given twice; leave one of them", param="config")
        keys[option.name] = key.value
        if not node.tag.endswith(":null"):
            values[option.name] = _written(node, f"{file}: {key.value!r}", several=option.multiple)
    return values, keys


def _written(node: Any, where: str, *, several: bool) -> str | list[str]:
    """A value of the file as the command line would have it."""
    if node.id == "scalar":
        return [node.value] if several else str(node.value)
    if node.id == "sequence" and several and all(each.id == "scalar" for each in node.value):
        return [str(each.value) for each in node.value]
    expected = "a value or a list of values" if several else "one value"
    raise RequestError(f"{where}: got a {node.id}, expected {expected}", param="config")


def serve(
    context: typer.Context,
    bundle: BundleArgument = None,
    model: BundleOption = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of options, named as here; the environment and the command line come before it.",
            is_eager=True,
            callback=_read_config,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the options that would hold, and where each came from.")
    ] = False,
    server: ServerGroup = ServerOptions(),
    limits: LimitsGroup = Limits(),
    backend: AnswerBackend = BackendOptions(),
    serving: SchedulingGroup = DEFAULT_SERVING,
) -> None:
    """Serve a bundle to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /metrics.

    Every option may also be set by an environment variable, DMTD_ and its name: DMTD_PORT, DMTD_API_KEY.
    """
    del config  # read before everything else
    directory = pick(bundle, model, "BUNDLE")
    if dry_run:
        server.refuse_open_bind()
        server.keys()
        tls_context(server)
        typer.echo("\n".join(_told(context)))
        return
    require("serve", ("fastapi", "uvicorn"), "serve")
    from dmtd_runtime.server.logs import logs_to_stderr
    from dmtd_runtime.server.run import Settings
    from dmtd_runtime.server.run import serve as run

    def announce(url: str, seconds: float) -> None:
        note(f"serving {directory} at {url} (opened in {seconds:.1f} s)")

    settings = Settings(bundle=directory, options=server, limits=limits, backend=backend, serving=serving)
    with logs_to_stderr(server.log_format):
        code = run(settings, announce=announce)
    if code:
        raise typer.Exit(code)


def _told(context: typer.Context) -> list[str]:
    """All options as a file for --config, each with where its value came from; keys are counted, not shown."""
    lines = []
    for each in context.command.params:
        name = str(each.name)
        if name in (*_OF_ONE_START, "help"):
            continue
        value = context.params.get(name)
        source = context.get_parameter_source(name)
        where = (
            "default" if source is None else source.name.lower().replace("_map", " file").replace("commandline", "flag")
        )
        shown = f"# {len(value)} not shown" if name == "api_key" and value else json.dumps(value, default=_plain)
        lines.append(f"{_flag(each).replace('_', '-')}: {shown}  # {where.replace('default file', 'file')}")
    return lines


def _flag(parameter: Any) -> str:
    """How a parameter is called on the command line: shutdown_timeout of --shutdown-timeout."""
    options = [each for each in parameter.opts if each.startswith("--")]
    return (max(options, key=len) if options else str(parameter.name)).lstrip("-").replace("-", "_")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value)
