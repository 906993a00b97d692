# SPDX-License-Identifier: Apache-2.0
"""Show on the image which visual tokens a model still sees after compression, and why.

Writes a picture (PNG) and a page (HTML, one file that loads nothing else).
"""

import argparse
import base64
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.config import Candidates, KVCompressionConfig, parse_cli_json
from vllm_kvcompress.tools import explain_drawing, explain_page, explain_server
from vllm_kvcompress.tools.explain_grid import given_grid, known_grid, parse_cells
from vllm_kvcompress.tools.explain_record import Column, Explanation, PromptMaps
from vllm_kvcompress.tools.visual_tokens import Size, TokenGrid

if TYPE_CHECKING:
    from PIL import Image

EXAMPLE = """\
examples:
  %(prog)s MODEL --image page.png --question "What is the total?" -o page
  %(prog)s MODEL --image page.png --question "..." --method bacon --method snapkv --budget 64
  %(prog)s --server http://127.0.0.1:8000 --image page.png --question "..."
"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="vllm-kvcompress explain",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="folder or name of the checkpoint; with --server only for the image's grid, and by "
        "default what the server says it serves",
    )
    made.add_argument("--image", metavar="FILE", type=Path, required=True)
    made.add_argument("--question", metavar="TEXT", required=True, help="about the image")
    made.add_argument(
        "-o",
        "--output",
        metavar="NAME",
        type=Path,
        default=Path("explained"),
        help="writes NAME.png and NAME.html (default: %(default)s)",
    )
    made.add_argument(
        "--method",
        metavar="METHOD",
        action="append",
        help="a value of --kv-compression, or a JSON object as in additional_config; give it twice "
        "to compare two (default: bacon)",
    )
    made.add_argument("--budget", metavar="B", help="value of --kv-budget")
    made.add_argument("--window", metavar="W", type=int, help="value of --kv-window")
    made.add_argument(
        "--full-cache", action="store_true", help="also answer without compression, to compare"
    )
    made.add_argument(
        "--server",
        metavar="URL",
        action="append",
        help="ask a running server instead, which has to be started for that (see "
        "docs/explain.md); give it twice to compare two",
    )
    made.add_argument("--max-tokens", metavar="N", type=int, default=64, help="longest answer")
    made.add_argument(
        "--grid",
        metavar="ROWSxCOLUMNS",
        help="of the image's visual tokens, for models whose grid is not known",
    )
    made.add_argument(
        "--engine-args",
        metavar="JSON",
        type=_json_object,
        default={},
        help="further arguments of vLLM's LLM, such as '{\"max_model_len\": 8192}'",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 with a message if there is nothing to show."""
    commands = parser()
    args = commands.parse_args(argv)
    _check(commands, args)
    try:
        explanation = explain(args)
    except (OSError, ValueError) as error:
        print(f"{commands.prog}: {error}", file=sys.stderr)
        return 1
    for path, data in (
        (_path(args, ".png"), _png(explain_drawing.draw(explanation))),
        (_path(args, ".html"), explain_page.page(explanation).encode()),
    ):
        path.write_bytes(data)
        print(f"wrote {path}")
    for column in explanation.columns:
        print(f"{column.title}: {column.answer.strip()}")
        for label, value in explain_drawing.summary(column):
            print(f"  {label}: {value}")
    return 0


def explain(args: argparse.Namespace) -> Explanation:
    """Ask, and gather what there is to show.

    Raises:
        ValueError: nothing was compressed, or it is not known which token is which cell.
        OSError: a file is not there, or a server does not answer.
    """
    from PIL import Image

    image = Image.open(args.image).convert("RGB")
    url = "data:image/png;base64," + base64.b64encode(_png(image)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": args.question},
    ]
    messages = [{"role": "user", "content": content}]
    model, full_answer = args.model, None
    columns: list[Column] = []
    for address in args.server or ():
        reply = explain_server.ask(address, messages, args.max_tokens)
        columns.append(_column(reply.text, reply.reports, f"server {address}"))
        model = model or reply.checkpoint
    if not args.server:
        from vllm_kvcompress.adapter import one_question  # imports vLLM: slow

        def ask(compression: Mapping[str, Any] | None) -> one_question.Reply:
            return one_question.ask(model, messages, compression, args.max_tokens, args.engine_args)

        for settings in _methods(args):
            answer = ask(settings)
            columns.append(_column(answer.text, answer.reports, "engine of this process"))
        if args.full_cache:
            full_answer = ask(None).text
    grid = _grid(args, model, messages, image, columns)
    return Explanation(model, image, args.question, grid, tuple(columns), full_answer)


def _check(commands: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message where the arguments do not go together; nothing is loaded yet."""
    if args.server:
        unfit = {
            "--method": args.method,
            "--budget": args.budget,
            "--window": args.window,
            "--full-cache": args.full_cache,
            "--engine-args": args.engine_args,
        }
        for name, value in unfit.items():
            if value:
                commands.error(f"{name}: a server has its own, leave it out with --server")
    elif args.model is None:
        commands.error("give a MODEL to load, or --server URL")
    for name, values in (("--method", args.method), ("--server", args.server)):
        if values and len(values) > 2:
            commands.error(f"{name}: two side by side at most, got {len(values)}")
    if args.max_tokens < 2:
        commands.error("--max-tokens: at least 2, for a prompt is compressed after the first token")
    if not args.image.is_file():
        commands.error(f"--image: there is no file {args.image}")
    # minutes of work must not end with this
    if not args.output.resolve().parent.is_dir():
        commands.error(f"-o: the folder of {args.output} does not exist")
    try:
        if args.grid:
            parse_cells(args.grid)
        for settings in _methods(args):
            KVCompressionConfig.parse(settings)
    except ValueError as error:
        commands.error(str(error))


def _methods(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of each column, as ``KVCompressionConfig.parse`` reads them."""
    shared = {"budget": args.budget, "window": args.window}
    given = {name: value for name, value in shared.items() if value is not None}
    found = []
    for text in args.method or ["bacon"]:
        own = parse_cli_json(text) if text.lstrip().startswith("{") else {"method": text}
        found.append(given | own)
    return found


def _column(text: str, reports: Sequence[Mapping[str, Any] | None], where: str) -> Column:
    prompt = PromptMaps.from_reports(reports)
    config = KVCompressionConfig.parse(prompt.config)
    budget = config.budget
    if config.candidates is Candidates.VISUAL:
        size = f"{budget} visual tokens" if budget.tokens else f"{budget} of the visual tokens"
    else:
        size = f"{budget} tokens" if budget.tokens else f"{budget} of the prompt"
    method = config.method.removesuffix("+uniform")
    title = f"{method}, budget {size}, window {config.window}"
    options = [f"{name} {value}" for name, value in config.options.items()]
    blocks = f"whole blocks of {prompt.block_size} tokens are kept"
    return Column(title, "; ".join([*options, blocks, where]), text, prompt)


def _grid(
    args: argparse.Namespace,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    image: "Image.Image",
    columns: Sequence[Column],
) -> TokenGrid:
    runs = columns[0].prompt.visual
    if not runs:
        raise ValueError("the prompt has no visual tokens: does this model take images?")
    if any(column.prompt.visual != runs for column in columns):
        raise ValueError(
            "the two prompts have their visual tokens in different places: do both servers run the "
            "same model?"
        )
    if args.grid:
        return given_grid(parse_cells(args.grid), Size(image.height, image.width), runs)
    processor_kwargs = args.engine_args.get("mm_processor_kwargs") or {}
    return known_grid(model, messages, image, runs, processor_kwargs)


def _path(args: argparse.Namespace, suffix: str) -> Path:
    return args.output.with_name(args.output.name + suffix)


def _png(image: "Image.Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _json_object(text: str) -> dict[str, Any]:
    """For argparse."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
