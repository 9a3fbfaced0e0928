"""``gptoss chat``: talk to a model in the terminal, on a running server or on one that lives as long as the chat."""

import asyncio
import sys
from typing import Any

import click
import rich_click

from gptoss.errors import ConfigError


@rich_click.command()
@click.argument("model_argument", metavar="[MODEL]", required=False)
@click.option("--url", metavar="URL", help="A running server; by default the one at the default address.")
@click.option("--model", metavar="NAME", help="The name of the model to ask for; by default what the server has.")
@click.option("--api-key", metavar="KEY", help="Sent as a bearer token, for servers that want one.")
@click.option("--system", metavar="TEXT", help="Instructions that stand before the conversation.")
@click.option("--temperature", type=float, metavar="T", help="As /set temperature.")
@click.option("--max-tokens", type=int, metavar="N", help="As /set max_tokens.")
def chat(model_argument: str | None, url: str | None, **options: Any) -> None:
    """Talk to a model; answers appear as they are made, Ctrl-C stops one.

    It asks the server at the default address. If none answers there, or MODEL is given and that server has another, it
    starts one of its own that ends with the chat: [bold]demo[/], or MODEL as for serve.

    What is piped in is one message, and its answer goes to standard output as plain text. In a terminal /help lists the
    commands: /why tells what happened with the last answer, /bundle saves its debug bundle.

    \b
    [bold]Examples[/]
      gptoss chat
      gptoss chat demo --system "Answer in one sentence."
      gptoss chat --url http://gpu-box:8000
      git diff | gptoss chat --system "Review this change."
    """  # noqa: D301 - \b is click's mark of a paragraph that keeps its lines
    if url is not None and model_argument is not None:
        raise ConfigError("a server at --url has its own model; name one of its models with --model")
    from gptoss.cli.chat_loop import run_chat  # noqa: PLC0415 - see gptoss.cli.main
    from gptoss.cli.chat_talk import ChatOptions  # noqa: PLC0415 - as above

    try:
        status = asyncio.run(run_chat(ChatOptions(spec=model_argument, url=url, **options)))
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
