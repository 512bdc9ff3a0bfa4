"""The tools of `palimpsest mcp`: what an assistant may do with a running service, through its asynchronous client.

An edit takes two calls. `try_edit` measures it and changes nothing; `apply_edit` applies what was tried, by its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import wraps
from itertools import islice
from typing import Annotated, Any, ParamSpec, TypeVar

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import Field

from cli.entry import installed_version
from palimpsest import AsyncClient, Edit, EditRejected, PalimpsestError, Progress, Trace

P = ParamSpec("P")
R = TypeVar("R")
Json = dict[str, Any]
Tool = Callable[..., Awaitable[Any]]

MAX_EDITS_LISTED = 50
INSTRUCTIONS = """\
Palimpsest serves a language model whose facts can be located, edited and reverted.
Ask the model before and after an edit. To edit, call try_edit first: it measures the edit and changes nothing. Show the
user what it reports, above all `also_changed`, and call apply_edit with its id only when the user agrees. Every applied
edit can be reverted exactly with revert_edit. In prompts {} stands for the subject."""

READS = ToolAnnotations(read_only_hint=True, destructive_hint=False, open_world_hint=False)
WRITES = ToolAnnotations(
    read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False
)

Prompt = Annotated[str, Field(description="a text that the model continues")]
Subject = Annotated[str, Field(description="who or what the fact is about, for example Eiffel Tower")]
Statement = Annotated[
    str, Field(description="the fact up to its object, {} for the subject: The {} is located in the city of")
]
Version = Annotated[
    str, Field(description='"head", the newest version; "base", without edits; a number; or a name')
]
Tokens = Annotated[int, Field(ge=1, le=512, description="maximum number of generated tokens")]
EditId = Annotated[str, Field(description="id of an edit, as try_edit and list_edits return it")]


def build_server(client: AsyncClient) -> MCPServer:
    """Return the server with all tools."""
    server = MCPServer("palimpsest", instructions=INSTRUCTIONS, version=installed_version())
    tools = Tools(client)
    reading: list[Tool] = [
        tools.describe_model,
        tools.ask,
        tools.compare_with_base,
        tools.try_edit,
        tools.list_edits,
        tools.show_edit,
    ]
    writing: list[Tool] = [tools.apply_edit, tools.revert_edit]
    for tool in reading:
        server.add_tool(reports_errors(tool), annotations=READS)
    server.add_tool(reports_errors(tools.trace_fact), annotations=READS, structured_output=False)
    for tool in writing:
        server.add_tool(reports_errors(tool), annotations=WRITES)
    return server


def reports_errors(tool: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """Return the tool with errors of the service as errors of the tool, which the assistant reads."""

    @wraps(tool)
    async def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await tool(*args, **kwargs)
        except PalimpsestError as error:
            raise ToolError(error.detail) from None

    return run


class Tools:
    """The calls of a service. The docstring of each method is the description that an assistant reads."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client

    async def describe_model(self) -> Json:
        """Describe the served model: its name, newest version, number of active edits, and whether it can chat."""
        (model,) = await self.client.models()
        return {
            "name": model.name,
            "newest_version": model.head,
            "active_edits": model.active_edits,
            "chat": model.chat,
            "layers": model.layers,
            "methods": [method["name"] for method in model.raw.get("methods", ())],
        }

    async def ask(self, prompt: Prompt, version: Version = "head", max_tokens: Tokens = 40) -> Json:
        """Let the model continue a text greedily, with its newest edits or at another version."""
        generation = await self.client.generate(
            prompt, max_new_tokens=max_tokens, temperature=0, version=read_version(version)
        )
        return {"text": generation.text, "version": generation.version}

    async def compare_with_base(
        self, prompt: Prompt, version: Version = "head", max_tokens: Tokens = 40
    ) -> Json:
        """Continue a text with the unedited model and with a version, and list the next tokens that differ most."""
        comparison = await self.client.compare(
            prompt, ("base", read_version(version)), max_new_tokens=max_tokens, temperature=0
        )
        base, edited = comparison.sides
        return {
            "base": base.text,
            "edited": edited.text,
            "version": edited.version,
            "next_tokens": [dict(token.raw) for token in islice(comparison.next_tokens, 5)],
        }

    async def trace_fact(self, prompt: Prompt, subject: Subject, context: Context[Any, Any]) -> list[Any]:
        """Show where the model carries a fact: causal tracing of a prompt that mentions the subject, as a heat map of
        layers and tokens. Takes up to some minutes."""
        trace = await self.client.trace(prompt, subject, on_progress=reporter(context))
        picture = await self.client.picture(trace, "png")
        return [trace_summary(trace), Image(data=picture, format="png")]

    async def try_edit(
        self,
        subject: Subject,
        prompt: Statement,
        new_object: Annotated[
            str, Field(description="the object that the model shall say, for example Rome")
        ],
        context: Context[Any, Any],
        true_object: Annotated[
            str | None, Field(description="the present object; left out, it is what the model says")
        ] = None,
    ) -> Json:
        """Measure an edit without applying it: what the model would say about the subject, in other wordings, and about
        other subjects. Returns an id for apply_edit."""
        edit = await self.client.edit(
            subject, prompt, new_object, true_object, dry_run=True, on_progress=reporter(context)
        )
        report = describe_edit(edit)
        if edit.status != "dry_run_passed":
            return report | {"next": "the guard would reject this edit: do not apply it."}
        return report | {"next": f"ask the user, then call apply_edit with {edit.id}."}

    async def apply_edit(
        self,
        dry_run_id: Annotated[str, Field(description="the id that try_edit returned")],
        context: Context[Any, Any],
    ) -> Json:
        """Apply an edit that try_edit measured and did not reject. A second call with the same id changes nothing."""
        tried = await self.client.get_edit(dry_run_id)
        if tried.status != "dry_run_passed":
            raise ToolError(
                f"{dry_run_id} is {tried.status}: apply only what try_edit measured and did not reject."
            )
        try:
            edit = await self.client.edit(
                tried.subject,
                tried.prompt,
                tried.target_new,
                tried.target_true,
                key=f"mcp-{dry_run_id}",
                on_progress=reporter(context),
            )
        except EditRejected as error:
            raise ToolError(f"the guard rejected the edit: {error.detail}") from None
        return describe_edit(edit)

    async def list_edits(
        self,
        search: Annotated[str | None, Field(description="text in subject, prompt or object")] = None,
        limit: Annotated[int, Field(ge=1, le=MAX_EDITS_LISTED)] = 20,
    ) -> Json:
        """List edits, newest first."""
        edits = [edit async for edit in self.client.edits(search=search, limit=limit)]
        return {"edits": [edit_summary(edit) for edit in edits]}

    async def show_edit(self, id: EditId) -> Json:
        """Show an edit with its measurements before and after."""
        return describe_edit(await self.client.get_edit(id))

    async def revert_edit(self, id: EditId) -> Json:
        """Revert an applied edit. The model is then what it would be without it, byte for byte."""
        edit = await self.client.revert(id)
        return edit_summary(edit) | {"reverted_version": edit.reverted_version}


def read_version(version: str) -> str | int:
    """Return a version as the client takes it: a number as a number."""
    return int(version) if version.isdecimal() else version


def reporter(context: Context[Any, Any]) -> Callable[[Progress], None]:
    """Return a function that reports the progress of a job to the assistant, without waiting for it."""
    sending: set[asyncio.Task[None]] = set()  # a task without a reference can be collected before it has run

    def report(progress: Progress) -> None:
        left = f", about {progress.seconds_left:.0f} s left" if progress.seconds_left else ""
        message = context.report_progress(progress.done, progress.total or None, f"{progress.phase}{left}")
        task = asyncio.ensure_future(message)
        sending.add(task)
        task.add_done_callback(sending.discard)

    return report


def edit_summary(edit: Edit) -> Json:
    """Return an edit in a few fields."""
    return {
        "id": edit.id,
        "status": edit.status,
        "statement": edit.prompt.replace("{}", edit.subject),
        "new_object": edit.target_new,
        "version": edit.version,
    }


def describe_edit(edit: Edit) -> Json:
    """Return what an edit changes: probabilities and texts, in other wordings and about others."""
    result = edit.result or {}
    report = edit_summary(edit)
    if edit.reason:
        report["reason"] = edit.reason
    if rewrite := result.get("rewrite"):
        report |= {
            "true_object": rewrite["true"],
            "probability_before": edit.before,
            "probability_after": edit.after,
            "says_before": rewrite.get("text_before"),
            "says_after": rewrite.get("text_after"),
        }
    report["paraphrases"] = list(_followed(result))
    report["also_changed"] = [dict(change) for change in edit.also_changed]
    return report


def _followed(result: Mapping[str, Any]) -> Iterator[Json]:
    for probe in result.get("paraphrase") or ():
        yield {
            "prompt": probe["prompt"],
            "says_after": probe.get("text_after"),
            "follows": probe.get("follows"),
        }


def trace_summary(trace: Trace) -> str:
    """Return the answer, how much it depends on the subject, and the strongest state of each kind."""
    result = trace.result or {}
    lines = [
        f"{trace.id}: {result['prompt']} → {result['answer']['text'].strip()}",
        f"p = {result['high']:.3f}, {result['low']:.3f} with noise on the subject.",
    ]
    for name, kind in result["kinds"].items():
        best = kind["best"]
        place = f"{result['tokens'][best['token']]!r}, layer {best['layer']}"
        lines.append(f"strongest {name}: p = {best['score']:.3f} at {place}.")
    return "\n".join(lines)
