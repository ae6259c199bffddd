"""Judges saved checkpoints on the test set, compares them, and classifies your own pictures."""

import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import checkpoint
import cli
import pictures
import reports
from compute import predict, select_device
from downloads import Cifar10, cifar10
from files import sha256, write_json
from records import DESCRIBED, environment


def parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="evaluate.py", description=__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="default: all finished")
    add(
        "--tta",
        choices=("none", "flip", "crops"),
        help="views to average over (none; pictures: flip)",
    )
    add("--predict", nargs="+", type=Path, metavar="PATH", help="classify pictures or folders")
    add("--data-dir", type=Path, default=Path("data"), help="where CIFAR-10 is kept")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--batch-size", type=int, default=250, help="images of 32x32 pixels at a time")
    add("--checkpoint-dir", type=Path, default=Path("checkpoints"), help="where weights are")
    add("--results-dir", type=Path, default=Path("results"), help="where numbers and pictures go")
    return parser


def finished(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, by name."""
    return sorted(p for p in folder.glob("*.pt") if not p.name.endswith(".resume.pt"))


def judge(
    path: Path,
    model: nn.Module,
    saved: dict[str, Any],
    arrays: Cifar10,
    *,
    tta: str,
    device: torch.device,
    batch_size: int,
    results_dir: Path,
) -> dict[str, Any]:
    """Evaluates a checkpoint on the test set and writes its `test.json` and pictures.

    Args:
        path: the checkpoint, which `checkpoint.load_model` has read.
        model: its network.
        saved: its other content.
        arrays: the test set is taken from them.
        tta: test-time augmentation, see `compute.views`.
        device: where the model is.
        batch_size: images at a time.
        results_dir: a folder named after the run is made or updated there.

    Returns:
        The content of test.json.

    Raises:
        ValueError: that folder holds the results of another checkpoint.
    """
    digest = sha256(path)
    earlier = reports.read_test_report(results_dir / saved["name"])
    if earlier.get("checkpoint_sha256", digest) != digest:
        raise ValueError(
            f"{results_dir / saved['name']}/ holds the results of another checkpoint than {path}: "
            "give --results-dir"
        )
    if not (config_path := results_dir / saved["name"] / "config.json").exists():
        write_json(config_path, {key: saved[key] for key in DESCRIBED if key in saved})
    limit = saved["config"].get("limit")  # a smoke run is judged on what it was meant for
    images = torch.from_numpy(arrays.test_images[:limit]).to(device)
    labels = torch.from_numpy(arrays.test_labels[:limit].astype(np.int64))
    begin = time.perf_counter()
    logits, logits_tta = predict(
        model, images, saved["mean"], saved["std"], batch_size=batch_size, tta=tta
    )
    seconds = round(time.perf_counter() - begin, 1)
    return reports.write_test_report(
        results_dir / saved["name"],
        logits=logits,
        labels=labels,
        logits_tta=None if tta == "none" else logits_tta,
        temperature=saved["metrics"].get("temperature"),
        images=images.cpu(),
        classes=saved["classes"],
        name=saved["name"],
        extra={
            "tta": tta,
            "checkpoint_sha256": digest,
            "device": environment(device)["hardware"],
            "seconds": seconds,
            "date": date.today().isoformat(),
        },
        earlier=earlier,
    )


def summary_lines(report: dict) -> str:
    """The figures of a test report as text for the terminal."""
    lines = [f"top-1 accuracy    {100 * report['top1']:.2f} % of {report['n']:,} test images"]
    if report["top1_tta"] is not None:
        lines.append(f"  with TTA        {100 * report['top1_tta']:.2f} % ({report['tta']})")
    lines.append(f"cross-entropy     {report['loss']:.4f} nats")
    lines.append(f"calibration error {100 * report['ece']:.2f} %")
    if report["ece_calibrated"] is not None:
        lines.append(
            f"  after scaling   {100 * report['ece_calibrated']:.2f} % "
            f"(temperature {report['temperature']:.3f}, fitted on validation images)"
        )
    return "\n".join(lines)


def classify(
    model: nn.Module, saved: dict[str, Any], wanted: list[Path], tta: str, device: torch.device
) -> None:
    """Prints the three likeliest classes of each picture.

    Raises:
        ValueError: some pictures could not be read; the others have been printed.
    """
    unreadable = 0
    files = list(pictures.find(wanted))
    if not files:
        raise ValueError(f"--predict {' '.join(map(str, wanted))}: no pictures there")
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    width = max(map(len, names))
    for name, file in zip(names, files, strict=True):
        try:
            image = torch.from_numpy(pictures.load(file).copy())[None].to(device)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            unreadable += 1
            continue
        _, logits = predict(model, image, saved["mean"], saved["std"], tta=tta)
        probabilities = (logits[0] / (saved["metrics"].get("temperature") or 1.0)).softmax(0)
        top = probabilities.topk(3)
        guesses = (
            f"{saved['classes'][index]} {100 * value:.1f} %"
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        )
        print(f"{name:<{width}}  {', '.join(guesses)}", flush=True)
    if unreadable:
        raise ValueError(f"{unreadable} of {len(files)} pictures could not be read, named above")


def evaluate(argv: list[str] | None) -> None:
    """Does what the command line says and prints it."""
    args = parser().parse_args(argv)
    device = select_device(args.device)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")
    checkpoints = args.checkpoints or finished(args.checkpoint_dir)
    if not checkpoints:
        raise FileNotFoundError(
            f"no finished checkpoint in {args.checkpoint_dir}/: run `python train_custom.py` "
            "first, or name one"
        )
    problems = []
    arrays = None
    for path in checkpoints:
        try:
            model, saved = checkpoint.load_model(path, device)
        except (ValueError, FileNotFoundError) as error:  # the others still come out
            problems.append(str(error))
            continue
        if not args.predict:
            arrays = arrays or cifar10(args.data_dir)
        try:
            if args.predict:
                if len(checkpoints) > 1:
                    print(f"{path}:")
                classify(model, saved, args.predict, args.tta or "flip", device)
                continue
            report = judge(
                path,
                model,
                saved,
                arrays,
                tta=args.tta or "none",
                device=device,
                batch_size=args.batch_size,
                results_dir=args.results_dir,
            )
        except ValueError as error:
            problems.append(str(error))
            continue
        run_dir = args.results_dir / report["name"]
        print(f"{path}\n{summary_lines(report)}\n\n{reports.per_class_table(report)}\n")
        print(f"numbers  {run_dir}/test.json\npictures {run_dir}/*.png\n", flush=True)
    if not args.predict and len(problems) < len(checkpoints):
        rows = reports.write_results_readme(args.results_dir)
        if not args.checkpoints:
            print(f"{reports.terminal_table(rows)}\ntable    {args.results_dir / 'README.md'}")
    if problems:
        raise ValueError("; ".join(problems))


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return cli.exit_code(lambda: evaluate(argv))


if __name__ == "__main__":
    sys.exit(main())
