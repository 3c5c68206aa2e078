"""The `gzoo` command: each subcommand is its parser lines and one function, which imports what it needs."""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run `gzoo ARGUMENTS`. Returns the exit code: 0, or 1 after an error; a wrong command line exits with 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv).parse_args(argv)
        args.command_line = shlex.join([*_launcher(), *argv])
        return args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"gzoo: error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name not in ("accelerate", "datasets", "matplotlib", "sklearn", "tqdm", "yaml"):
            raise
        print(f"gzoo: error: {error.name} is not installed; pip install 'gzoo[demo]'", file=sys.stderr)
    except KeyboardInterrupt as error:
        print(f"\ngzoo: error: {error or 'interrupted'}", file=sys.stderr)
    return 1


def _launcher() -> list[str]:
    """What the command line began with: torch.distributed.run, where that started several processes."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1:
        return ["gzoo"]
    return ["python", "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m", "gzoo.cli"]


class _Parser(argparse.ArgumentParser):
    """Takes no flag cut short, which would be another: --subset, which there is not, --subset-lr."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's own, but what is unknown to a command is said by that command, with its usage."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"no argument is called {unknown[0]}; {self.prog} --help lists them")
        return known, unknown


class _Versions(argparse.Action):
    """As argparse's own, but reads the versions where they are asked for, not in every command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(", ".join(f"{name} {version(name)}" for name in ("gzoo", "timm", "torch", "escnn")))
        parser.exit()


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="gzoo", description="Group-equivariant CNNs for timm.")
    parser.add_argument("--version", action=_Versions, nargs=0, help="versions of gzoo and of what it stands on")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train or fine-tune a model")
    command.set_defaults(run=_train)
    command.add_argument("--recipe", help="a YAML file with these options as its keys; flags override it")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out")
    if argv[:1] == ["train"]:  # the flags come from gzoo.train, whose import the other commands do not wait for
        _add_config_flags(command)

    command = commands.add_parser("eval", help="measure a model on a data set")
    command.set_defaults(run=_eval)
    command.add_argument("--model", required=True, help="a registered model, or a folder that `gzoo train` wrote")
    command.add_argument("--pretrained", action="store_true", help="load a registered model's weights")
    command.add_argument("--data", required=True, help="folder of images or parquet files, or dataset on the Hub")
    command.add_argument("--split", default="test", choices=("train", "val", "test"), help="default: test")
    command.add_argument("--batch-size", type=_at_least(1), default=256)
    command.add_argument("--workers", type=_at_least(0), default=0, help="processes that decode images")
    command.add_argument("--bf16", action="store_true", help="autocast to bfloat16, unless a CPU would emulate it")
    command.add_argument(
        "--transforms",
        action="store_true",
        help="also under the 8 rotations and flips of a square; those that change no logits, on noise to 1e-4, are not "
        "run again",
    )
    command.add_argument("--rotation-seed", type=int, help="also with each image rotated by an angle from this seed")
    command.add_argument("--json", type=_writable, help="write the result to this file")

    command = commands.add_parser("predict", help="classify images")
    command.set_defaults(run=_predict)
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("--model", required=True, help="a folder that `gzoo train` wrote, or a pretrained model")
    command.add_argument("--topk", type=int, default=5, help="classes to print, default: 5")
    command.add_argument("--json", type=_writable, help="write the predictions to this file")

    command = commands.add_parser("plan", help="show the widths of a conversion before anything is built")
    command.set_defaults(run=_plan)
    command.add_argument("model", help="a plain model of timm or of ours, such as resnext50_32x4d")
    command.add_argument("--group", required=True, help="such as p4m or c8, or by stage: d8:d4:d1")
    command.add_argument(
        "--basis", choices=("pixel", "steerable", "steerable_3r"), help="of the kernels, default: by the group"
    )

    command = commands.add_parser("coverage", help="convert, train a step and check timm's convolutional networks")
    command.set_defaults(run=_coverage)
    command.add_argument("--group", default="p4", help="default: p4")
    command.add_argument("--module", nargs="+", help="timm's modules, such as resnet; default: all convolutional ones")
    command.add_argument("--most-params", type=float, default=float("inf"), help="leave out larger networks: 30e6")
    command.add_argument("--out", default="coverage.csv", help="a row for each network; a second run goes on there")

    command = commands.add_parser("import", help="turn a checkpoint of another library into a folder of ours")
    command.set_defaults(run=_import)
    command.add_argument(
        "source",
        choices=("equivision", "redet"),
        help="equivision: https://github.com/dmklee/equivision; redet: a ReResNet of "
        "https://github.com/csuhan/ReDet or of mmrotate",
    )
    command.add_argument("checkpoint", help="the file")
    command.add_argument("--model", help="which of equivision's networks it is of, such as d4resnet50")
    command.add_argument("--out", required=True, help="folder for model.safetensors and config.json")
    command.add_argument(
        "--strides",
        default="symmetric",
        choices=("symmetric", "original"),
        help="symmetric: exact at every size, and the original's logits at 32 n + 1 pixels; original: those at every "
        "size, and exact at 32 n + 1; default: symmetric",
    )

    command = commands.add_parser("check", help="measure the equivariance error of a model")
    command.set_defaults(run=_check)
    command.add_argument("model", help="a registered model, or a folder that `gzoo train` wrote")
    command.add_argument("--pretrained", action="store_true", help="load a registered model's weights")
    command.add_argument(
        "--model-args", nargs="+", type=_pair, default=[], metavar="KEY=VALUE", help="of the model, such as head=pose"
    )
    command.add_argument("--size", nargs="+", type=_size, default=[(32, 32), (33, 33), (32, 49)], metavar="SIZE")
    command.add_argument("--group", help="needed for plain networks: the group to check, such as p4m")
    command.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    command.add_argument(
        "--tolerance", type=_at_least(0, float), help="largest error, default: 1e-12 in float64, 1e-5 in float32"
    )

    command = commands.add_parser("bench", help="time models against escnn and the plain network of the expanded width")
    command.set_defaults(run=_bench)
    command.add_argument("--model", nargs="+", help="registered models, default: p4m_resnet44 and p4m_resnet18")
    command.add_argument("--size", type=int, help="side of the images, default: 32 for p4m_resnet44, else 64")
    command.add_argument("--batch-size", type=int, default=16, help="default: 16")
    command.add_argument("--threads", type=int, default=2, help="of torch on the CPU, default: 2")
    command.add_argument("--rounds", type=int, default=15, help="how often a training step is timed, default: 15")
    command.add_argument("--processes", type=int, default=5, help="fresh processes per construction, default: 5")
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    command.add_argument(
        "--winograd", action="store_true", help="gzoo's steps, not its rivals', as gzoo train --winograd"
    )
    command.add_argument("--json", type=_writable, help="write the result to this file")

    command = commands.add_parser("mnist6", help="learn a partial symmetry: a 6 against its turned or mirrored copy")
    command.set_defaults(run=_mnist6)
    command.add_argument("--mnist", required=True, help="MNIST: folder of parquet files, or dataset on the Hub")
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--continuous", action="store_true", help="over SE(2) and E(2), not over groups on the grid")
    command.add_argument("--json", type=_writable, help="write the result to this file")

    command = commands.add_parser("demo", help="two minutes of tour, offline")
    command.set_defaults(run=_demo)
    command.add_argument("--out", default="gzoo_demo", help="folder for the picture, default: gzoo_demo")

    command = commands.add_parser("card", help="measure a finished run of a recipe in recipes/ and write its card")
    command.set_defaults(run=_card)
    command.add_argument("run_folder", metavar="RUN", help="the --out of `gzoo train`")
    command.add_argument("--data", required=True, help="the data set, for its test split")
    command.add_argument("--bf16", action="store_true", help="test in bfloat16, for large networks on a CPU")

    command = commands.add_parser("leaderboard", help="write results.csv and pins.csv from the cards, print the table")
    command.set_defaults(run=_leaderboard)
    command.add_argument(
        "--measure", action="store_true", help="first measure speed and memory of all, on this machine"
    )

    command = commands.add_parser(
        "push", help="upload a model card, or what `gzoo train` made, to the Hugging Face Hub"
    )
    command.set_defaults(run=_push)
    command.add_argument("source", help="NAME.TAG of a card, or the --out of `gzoo train`")
    command.add_argument("--org", help="organization or user; for the cards of the zoo, default: ours")
    command.add_argument("--name", help="of the repository, default: that of the card or the network")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--dry-run", action="store_true", help="list what would be uploaded")

    data = commands.add_parser("data", help="make data sets").add_subparsers(required=True, metavar="DATA")
    command = data.add_parser("rotmnist", help="rotated MNIST: 12,000 images to train, 50,000 to test")
    command.set_defaults(run=_data_rotmnist)
    command.add_argument("--mnist", required=True, help="MNIST: folder of parquet files, or dataset on the Hub")
    command.add_argument("--out", required=True, help="folder to write train.parquet and test.parquet to")
    command.add_argument("--seed", type=int, default=20161, help="of the angles, default: 20161")
    return parser


def _add_config_flags(command: argparse.ArgumentParser) -> None:
    """One flag for every field of `TrainConfig`; what is not given stays out of the namespace."""
    from dataclasses import MISSING, fields

    from gzoo.train import TrainConfig

    for field in fields(TrainConfig):
        text = field.metadata["help"].replace("%", "%%")
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if default is not MISSING and default not in (None, 0, False, {}):
            text += f" (default: {default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if str(field.type).startswith("dict"):
            options |= {"nargs": "+", "type": _pair, "metavar": "KEY=VALUE"}
        elif field.type == "bool":
            options |= {"action": argparse.BooleanOptionalAction}
        elif "tuple" in str(field.type):
            options |= {"nargs": "+", "type": _value, "metavar": field.name.upper()}
        else:
            options |= {"type": str if field.type == "str" else _value, "metavar": field.name.upper()}
        command.add_argument(f"--{field.name.replace('_', '-')}", **options)


_YAML = {"true": True, "false": False, "null": None}  # as recipes spell them


def _value(text: str) -> Any:
    """A number, a list, true, false or null where the text spells one, else the text."""
    try:
        return _YAML[text.lower()] if text.lower() in _YAML else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _listed(values: list[Any]) -> Any:
    """What a flag of several numbers was given: `0.5 1`, or one list as Python spells it, or null."""
    return values if len(values) > 1 or isinstance(values[0], int | float) else values[0]


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE, such as lr=0.1")
    return key, _value(value)


def _train(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from gzoo.train import TrainConfig, make_config, merge, read_recipe, resume_config, train

    flags = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if hasattr(args, f.name)}
    types = TrainConfig.__annotations__
    flags = {k: dict(v) if types[k].startswith("dict") else v for k, v in flags.items()}
    flags = {k: _listed(v) if "tuple" in types[k] else v for k, v in flags.items()}
    recipe = read_recipe(args.recipe) if args.recipe else {}
    config = resume_config(recipe, flags) if args.resume else make_config(merge(recipe, flags))
    train(config, args.resume, args.command_line)
    return 0


def _eval(args: argparse.Namespace) -> int:
    import torch

    from gzoo.data import open_split
    from gzoo.evaluate import evaluate
    from gzoo.predict import load_model, names_weights

    data = open_split(args.data, args.split)
    pretrained = args.pretrained or names_weights(args.model)
    model = load_model(args.model, pretrained)
    if not pretrained:
        print(f"gzoo: these are random weights; --pretrained loads those of {args.model}", file=sys.stderr)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate(
        model, data, args.batch_size, args.workers, args.bf16, args.transforms, rotation_seed=args.rotation_seed
    )
    rows = {name: value for name, value in result.items() if not isinstance(value, dict)}
    for what, views in (("top1", "transforms"), ("and pose", "transforms_pose")):
        rows |= {f"{what}, {view}": value for view, value in result.get(views, {}).items()}
    for name, value in rows.items():
        print(f"{name:<24}{value:>12.4f}" if isinstance(value, float) else f"{name:<24}{value:>12}")
    _write_report(args, {"model": args.model, "data": args.data, "split": args.split, **result})
    return 0


def _writable(path: str) -> Path:
    """A file that can be written once there is something to write, which may be after hours."""
    file = Path(path).expanduser().absolute()
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: this is a folder; give a file in it")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no such folder to write it to")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: no permission to write it")
    return file


def _at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        if not kind(text) >= least:  # as no NaN is
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return kind(text)

    number.__name__ = kind.__name__  # which argparse names where the text is no number
    return number


def _write_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """To the file of --json, if it was given."""
    if args.json:
        text = json.dumps({"command": args.command_line, **report}, indent=2) + "\n"
        args.json.write_text(text, encoding="utf-8")


def _predict(args: argparse.Namespace) -> int:
    import torch

    from gzoo.predict import load_model, predict

    model = load_model(args.model, pretrained=True).to("cuda" if torch.cuda.is_available() else "cpu")
    predictions = []
    for path in args.images:  # one by one: of many, the first are there at once
        predictions += predict(model, [path], args.topk)
        prediction = predictions[-1]
        if prediction.error is not None:
            continue
        print(path)
        for name, probability in zip(prediction.names, prediction.probabilities, strict=True):
            print(f"  {probability:8.2%}  {name}")
    _write_report(args, {"model": args.model, "predictions": [asdict(prediction) for prediction in predictions]})
    failed = [prediction for prediction in predictions if prediction.error is not None]
    for prediction in failed:
        print(f"gzoo: error: {prediction.path} cannot be read: {prediction.error}", file=sys.stderr)
    return 1 if failed else 0


def _size(text: str) -> tuple[int, int]:
    """ "48" or "48x65": height and width in pixels."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 48 or 48x65; a model stands before --size")
    return int(sides[0]), int(sides[-1])


def _plan(args: argparse.Namespace) -> int:
    from gzoo.plan import comparison

    print(comparison(args.model, args.group, args.basis))
    return 0


def _coverage(args: argparse.Namespace) -> int:
    from gzoo.coverage import CONV_MODULES, architectures, coverage, table

    found = architectures(tuple(args.module or CONV_MODULES), args.most_params)
    if not found:
        raise ValueError(f"timm has no architectures in {args.module}; its modules are: {', '.join(CONV_MODULES)} ...")
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    print(table(coverage(found, args.group, Path(args.out), say)))
    return 0


def _import(args: argparse.Namespace) -> int:
    from gzoo import equivision, redet

    if args.source == "equivision":
        equivision.import_checkpoint(args.checkpoint, args.model, args.out, args.strides)
    elif args.model:
        raise ValueError(f"--model is {args.model!r}, but a file of ReDet says itself which depth it has; leave it out")
    else:
        redet.import_checkpoint(args.checkpoint, args.out, args.strides)
    print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")
    return 0


def _followed(report: Any) -> str:
    """What a network that passed follows: all elements, or those that it has not given up."""
    whole, order = report.group.grid_elements, report.group.order
    if not report.given_up and len(whole) < order:
        return (
            f"equivariant to the {len(whole)} of {order} elements that fit the pixel grid; the others are not measured"
        )
    if not report.given_up:
        return "equivariant"
    kept = [report.group.label(g) for g in report.group.grid_elements if g not in report.given_up]
    largest = max(report.given_up.values())
    return f"equivariant to {', '.join(kept)} alone; the others, given up, err by up to {largest:.1e}"


def _check(args: argparse.Namespace) -> int:
    import torch

    from gzoo import groups
    from gzoo.check import check
    from gzoo.predict import load_model, names_weights

    model = load_model(args.model, args.pretrained or names_weights(args.model), **dict(args.model_args))
    dtype = getattr(torch, args.dtype)
    tolerance = args.tolerance if args.tolerance is not None else 1e-12 if args.dtype == "float64" else 1e-5
    group = groups.get(args.group) if args.group else None
    reports = []
    for size in args.size:
        try:
            reports.append(check(model, size, group, dtype))
        except (RuntimeError, AssertionError, IndexError) as error:
            height, width = size
            raise ValueError(
                f"{args.model} takes no images of {height}x{width} pixels; give --size others, larger ones if it "
                f"reduces them often: {error}"
            ) from error
        except ValueError as error:
            raise ValueError(f"{args.model} at {size[0]}x{size[1]} pixels: {error}") from error
        print(reports[-1], end="\n\n", flush=True)
    worst = max(report.worst for report in reports)
    passed = worst <= tolerance
    verdict = _followed(reports[0]) if passed else "FAILED"
    print(f"{args.model}: worst error {worst:.1e}, tolerance {tolerance:.0e}: {verdict}")
    return 0 if passed else 1


def _bench(args: argparse.Namespace) -> int:
    from gzoo.bench import CASES, Case, bench, table

    sizes = dict(CASES)
    cases = [Case(name, args.size or sizes.get(name, 64)) for name in args.model or sizes]
    report = bench(
        cases,
        args.batch_size,
        args.threads,
        args.rounds,
        args.processes,
        args.device,
        say=lambda text: print(text, file=sys.stderr, flush=True),
        winograd=args.winograd,
    )
    print(table(report))
    _write_report(args, report)
    return 0


def _mnist6(args: argparse.Namespace) -> int:
    from gzoo.mnist6 import CONTINUOUS_TASKS, TASKS, mnist6, table

    say = functools.partial(print, file=sys.stderr, flush=True)
    report = mnist6(args.mnist, args.seed, say, CONTINUOUS_TASKS if args.continuous else TASKS)
    print(table(report))
    _write_report(args, report)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from gzoo.demo import demo

    demo(args.out)
    return 0


def _push(args: argparse.Namespace) -> int:
    from gzoo.hub import planned, push
    from gzoo.weights import HUB_ORGANIZATION

    if args.org is None and Path(args.source).is_dir():
        raise ValueError(f"say whose repository {args.source} is to be: --org YOU, your name on the Hub")
    organization = args.org or HUB_ORGANIZATION
    if args.dry_run:
        folder, repository, files = planned(args.source, organization, args.name)
        print(f"{repository}:", *(f"{(folder / file).stat().st_size:>12,} {file}" for file in files), sep="\n")
    else:
        print(push(args.source, organization, args.name, args.private))
    return 0


def _card(args: argparse.Namespace) -> int:
    from gzoo.card import make_card

    print(make_card(args.run_folder, args.data, bf16=args.bf16))
    return 0


def _leaderboard(args: argparse.Namespace) -> int:
    from gzoo.card import update_tables

    print(update_tables(args.measure))
    return 0


def _data_rotmnist(args: argparse.Namespace) -> int:
    from gzoo.data import make_rotated_mnist

    sizes = make_rotated_mnist(args.mnist, args.out, args.seed)
    print(f"{args.out}: {sizes['train']} images to train and validate, {sizes['test']} to test, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
