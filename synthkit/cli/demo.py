"""`synthkit demo`: the main job on the embedded default, from a teacher without data to a distilled student.

The embedded teacher is LeNet-5 with BatchNorm, trained on MNIST; the bank of 10,000 images is synthesized from it
alone, the half-width student is trained from that bank alone, and both are measured on 2,000 embedded test images.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from synthkit.cli.arguments import Arguments, print_json
from synthkit.errors import OutputExistsError
from synthkit.paths import assets_dir

BANK_RECIPE, STUDENT_RECIPE = "mnist/cudfkd-lenet5_bn-demo", "mnist/distill-lenet5_half_bn-demo"
SMOKE = {"images": 600, "method": {"epochs": 3, "ep_steps": 10}}


def main(argv: list[str]) -> int:
    """Parse, run, print the table."""
    parser = Arguments(prog="synthkit demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("synthkit-demo"), help="folder for bank, student and report")
    parser.add_argument("--seed", type=int, default=0, help="base seed")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted demo in --out")
    parser.add_argument(
        "--smoke", action="store_true", help="a few seconds only: shows that everything works, learns nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--result", type=Path, default=None, help="also write the result JSON here")
    args = parser.parse(argv)
    if args.out.exists() and any(args.out.iterdir()) and not args.resume:
        raise OutputExistsError(f"{args.out} is not empty", hint="go on with --resume, or choose another --out")
    from synthkit.bench.pipeline import pipeline
    from synthkit.report import report
    from synthkit.runtime import write_json

    start = time.monotonic()
    # LeNet's steps are too small to share: one thread is measured faster for the generator, two for the student.
    overrides = {**(SMOKE if args.smoke else {}), "runtime": {"threads": args.threads or 1}}
    threads = args.threads or min(2, os.cpu_count() or 1)
    result = pipeline(
        BANK_RECIPE,
        STUDENT_RECIPE,
        seeds=[args.seed],
        eval_data=f"bank:{assets_dir() / 'banks' / 'mnist-eval'}",
        work=args.out,
        overrides=overrides,
        distill_overrides={**({"steps": 20} if args.smoke else {}), "runtime": {"threads": threads}},
    )
    run = args.out / f"student-seed{args.seed}"
    page = args.out / "report.html"
    if page.exists():
        page.unlink()
    report([args.out / f"bank-seed{args.seed}", run], page)
    result["seconds"] = time.monotonic() - start
    write_json(args.out / "result.json", result)
    if args.result:
        write_json(args.result, result)
    if args.json:
        print_json(result)
        return 0
    student = result["runs"][0]
    rows = [
        ("teacher lenet5_bn (trained on real MNIST)", result["teacher"]["top1"], None),
        ("student lenet5_half_bn, from the synthetic bank alone", student["student_top1"], student["agreement"]),
        ("control: same student, same steps, on noise", result["control"]["top1"], result["control"]["eval_agreement"]),
        ("co-trained student (by-product of the synthesis)", student["co_trained_top1"], None),
    ]
    print(f"\n{'':55} top-1   agreement with the teacher   (2,000 real test images)")
    for name, top1, agreement in rows:
        shown = f"{100 * agreement:6.2f} %" if agreement is not None else ""
        print(f"{name:55} {100 * top1:5.2f} %   {shown}".rstrip())
    print(f"\n{result['seconds']:.0f} s; report: {page}")
    print(f"look at the images:  synthkit bank show {args.out / f'bank-seed{args.seed}'}")
    print(f"use the student:     synthkit evaluate --model {run} --data mnist:DIR")
    return 0
