"""`synthkit bank pull`: a bank from the Hugging Face Hub, every hash checked before it appears."""

from __future__ import annotations

from argparse import Namespace

from synthkit.bank.hub.common import parse_repo
from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.common import clean
from synthkit.cli.bank.transfer import transfer


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("repo", metavar="REPO[@REVISION]", help="dataset repository, at a branch, tag or commit")
    parser.add_argument("--out", metavar="DIR", required=True, help="bank directory to make")
    parser.add_argument("--revision", metavar="NAME", help="like @REVISION")
    parser.add_argument("--expect", metavar="SEAL", help="refuse any other bank than the one with this seal")
    parser.add_argument("--no-labels", action="store_true", help="leave its label sets out")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Pull and say what came."""
    from synthkit.bank.hub.pull import pull

    repo = parse_repo(args.repo, args.revision)
    with transfer("pull") as (said, progress):
        done = pull(repo, args.out, expect=args.expect, labels=not args.no_labels, said=said, progress=progress)
    if args.json:
        print_json({"repo": done.repo, "commit": done.commit, "seal": done.seal, "files": done.files,
                    "bytes": done.bytes, "fetched": done.fetched, "left_out": done.left_out,
                    "out": str(args.out)})  # fmt: skip
        return 0
    if done.left_out:
        shown = ", ".join(clean(name, 60) for name in done.left_out[:8])
        print(f"not part of a bank, not fetched: {shown}{', ...' if len(done.left_out) > 8 else ''}")
    print(f"pulled {len(done.bank):,} images ({done.files} files, {done.bytes / 1e6:,.1f} MB) into {args.out}")
    print(f"commit {done.commit}")
    print(f"seal   {done.seal or 'none (an old bank); root ' + done.bank.info()['root']}")
    print(done.bank.info()["origin"])
    return 0
