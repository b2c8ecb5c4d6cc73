"""`synthkit bank push`: a sealed bank to the Hugging Face Hub."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from synthkit.bank.hub.common import parse_repo
from synthkit.cli.arguments import Arguments, print_json
from synthkit.cli.bank.common import clean
from synthkit.cli.bank.transfer import transfer


def configure(parser: Arguments) -> None:
    """Add the options."""
    parser.add_argument("bank", metavar="BANK", help="bank directory")
    parser.add_argument("repo", metavar="REPO", help="dataset repository, OWNER/NAME; it is made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to push to (main)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument("--replace", action="store_true", help="push even where the branch holds another bank")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> int:
    """Push and say how to pull it again."""
    from synthkit.bank.hub.push import push

    repo = parse_repo(args.repo, args.revision)
    with transfer("push") as (said, progress):
        done = push(args.bank, repo, private=args.private, message=args.message, replace=args.replace, said=said,
                    progress=progress)  # fmt: skip
    if args.json:
        print_json(asdict(done))
        return 0
    for name in done.skipped_sets:
        print(f"note: label set {clean(name)} is unfinished and was not pushed")
    for name in done.removed:
        print(f"note: {clean(name)} is no longer part of the bank; the history of the repository keeps it")
    print(f"pushed {done.files} files ({done.bytes / 1e6:,.1f} MB, {done.uploaded} new or changed) to {done.repo}")
    expect = f" --expect {done.seal}" if done.seal else ""
    print(f"pull it with: synthkit bank pull {done.repo}@{done.commit} --out DIR{expect}")
    return 0
