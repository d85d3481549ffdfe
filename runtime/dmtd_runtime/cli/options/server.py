"""The options of `dmtd serve`: what listens, what one client may ask for, and how the engine shares its passes."""

from __future__ import annotations

from typing import Annotated, Any

from dmtd_runtime.cli.options.groups import Group, option
from dmtd_runtime.cli.options.serving import SERVING
from dmtd_runtime.server.options import Limits, ServerOptions
from dmtd_runtime.serving.options import ServingOptions

_HTTP, _LIMITS = "Server", "Limits: what one client may ask for"


def _seconds(text: str, flag: str, panel: str) -> Any:
    """An option whose name says no unit, nor does its variable."""
    return option(
        text, flag, panel=panel, envvar=f"DMTD_{flag.lstrip('-').replace('-', '_').upper()}", metavar="SECONDS"
    )


HTTP = Group(
    {
        "host": option("Address to listen on; one that others reach needs a key or --insecure.", panel=_HTTP),
        "port": option("Port; 0 takes a free one.", panel=_HTTP),
        "served_model_name": option(
            "The model's name in requests, by default the bundle's directory; may be given again.",
            "--served-model-name",
            panel=_HTTP,
        ),
        "api_key": option(
            "A key that clients must send; may be given again. Others on this machine can read command lines: prefer "
            "DMTD_API_KEY (several, with blanks between) or --api-key-file.",
            "--api-key",
            panel=_HTTP,
            metavar="KEY",
        ),
        "api_key_file": option("A file of keys, one a line.", panel=_HTTP),
        "insecure": option("Let everybody who reaches the address ask, without a key.", "--insecure", panel=_HTTP),
        "protect_metrics": option("/metrics needs a key too.", "--protect-metrics", panel=_HTTP),
        "allowed_origins": option(
            "Web pages of this origin may ask (CORS): https://example.org, or * for all; may be given again. By default none.",
            "--allowed-origin",
            panel=_HTTP,
            envvar="DMTD_ALLOWED_ORIGIN",
        ),
        "ssl_certfile": option("Certificate (PEM): serve https.", panel=_HTTP),
        "ssl_keyfile": option(
            "Its key, without a password, where the certificate's file does not hold it.", panel=_HTTP
        ),
        "ssl_ca_certs": option(
            "Certificates (PEM) of authorities; a client without a certificate of theirs is refused.", panel=_HTTP
        ),
        "root_path": option("The prefix that a proxy strips: /models/dmtd.", panel=_HTTP),
        "max_num_seqs": option(
            "Sequences at a time, by default 8 or as many as the bundle was exported for.", panel=_HTTP, min=1
        ),
        "allow_plain": option(
            'Clients may ask for plain mode ("dmtd": {"plain": true}); opens the bundle twice.',
            "--allow-plain",
            panel=_HTTP,
        ),
        "chat_template": option("A template (jinja) in place of the bundle's.", panel=_HTTP),
        "tool_call_parser": option(
            "How the model writes calls: hermes or llama3_json; by default as its template does.", panel=_HTTP
        ),
        "reasoning_parser": option("think: <think>...</think> goes to reasoning_content.", panel=_HTTP),
        "shutdown_timeout_s": _seconds(
            "Seconds that running requests have after SIGTERM.", "--shutdown-timeout", _HTTP
        ),
        "log_format": option("text, or json: an object a line.", panel=_HTTP),
        "log_requests": option("Bodies of requests go to the log, prompts and all.", "--log-requests", panel=_HTTP),
    }
)
LIMITS = Group(
    {
        "max_body_bytes": option("Bytes of a request's body.", panel=_LIMITS),
        "max_header_bytes": option("Bytes of a request's head.", panel=_LIMITS),
        "max_connections": option("Connections that may be open.", panel=_LIMITS),
        "header_timeout_s": _seconds("Seconds for a request's head to come.", "--header-timeout", _LIMITS),
        "body_timeout_s": _seconds("Seconds for its body.", "--body-timeout", _LIMITS),
        "keep_alive_s": _seconds("Seconds that an idle connection stays open.", "--keep-alive", _LIMITS),
        "write_timeout_s": _seconds(
            "Seconds after which a client that reads nothing is dropped.", "--write-timeout", _LIMITS
        ),
        "queue_timeout_s": _seconds("Seconds that a request may wait for its turn.", "--queue-timeout", _LIMITS),
        "request_timeout_s": _seconds("Seconds that a request may take.", "--request-timeout", _LIMITS),
        "max_prompts": option("Prompts of a request.", panel=_LIMITS),
        "max_prompt_tokens": option("Tokens of a prompt; by default the model's length.", panel=_LIMITS),
        "max_output_tokens": option("Tokens of an answer; by default the model's length.", panel=_LIMITS),
        "max_n": option("Choices of a prompt.", panel=_LIMITS),
        "max_stop": option("Stop strings.", panel=_LIMITS),
        "max_stop_chars": option("Characters of one.", panel=_LIMITS),
        "max_logprobs": option("Log probabilities of a token.", panel=_LIMITS),
        "max_logit_bias": option("Entries of logit_bias.", panel=_LIMITS),
        "max_messages": option("Messages of a conversation.", panel=_LIMITS),
        "max_tools": option("Tools of a request.", panel=_LIMITS),
        "max_schema_bytes": option("Bytes of a schema or grammar.", panel=_LIMITS),
        "max_schema_depth": option("Levels of a schema.", panel=_LIMITS),
    }
)
ServerGroup = Annotated[ServerOptions, HTTP]
LimitsGroup = Annotated[Limits, LIMITS]
SchedulingGroup = Annotated[ServingOptions, SERVING]
