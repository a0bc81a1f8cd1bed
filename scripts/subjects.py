"""Lists the subjects of a benchmark, checked: name, superclass, folder of photos and protocol, with tabs between them.

python scripts/subjects.py photos/dreambooth/dataset
python scripts/subjects.py photos/customconcept101 --protocols outputs/customconcept101/protocols
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf

from infusion.metrics.run.protocol import KEYS
from infusion.metrics.run.subjects import BenchmarkSubject, read
from ldm.util.cli import Parser, UserError, report, words, writable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        description="Lists a benchmark's subjects: name, superclass, folder of photos, protocol; a line each."
    )
    add = parser.add_argument
    add("photos", metavar="DIR", help="has a folder of photos for each subject of DreamBooth, or a dataset.json")
    add("--subjects", metavar="S[,S]", type=words, help="some of them; None: all")
    add("--protocols", type=writable, metavar="DIR", help="gets a protocol for each subject of a dataset.json")
    return parser.parse_args(arguments)


def protocol_file(subject: BenchmarkSubject, folder: str | None) -> str:
    """The shipped file with a subject's prompts, or one that is written; a file with other contents is left alone."""
    if subject.protocol:
        return subject.protocol
    if folder is None:
        raise UserError(
            f"--protocols: name a folder for the protocols; none that is shipped has {subject.name}'s prompts"
        )
    from ldm.util.files import write  # after the flags: it takes seconds

    content, path = subject.as_protocol().as_dict(), Path(folder) / f"{subject.name}.yaml"
    text = OmegaConf.to_yaml({key: content[key] for key in KEYS})
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"--protocols: {path} exists already, with other prompts; name another folder")
    write(path, text.encode())
    return str(path)


@report
def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    subjects = read(flags.photos, flags.subjects)
    files = [protocol_file(subject, flags.protocols) for subject in subjects]
    for subject, file in zip(subjects, files, strict=True):
        print(subject.name, subject.superclass, subject.photos, file, sep="\t")


if __name__ == "__main__":
    main()
