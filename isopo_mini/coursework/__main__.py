"""What an instructor types: `python -m isopo_mini.coursework student DIR`, `… grade DIR OUT`, `… autograder DIR`."""

import argparse
import dataclasses
import sys
from pathlib import Path

import isopo_mini
from isopo_mini.coursework import grading, handing_out
from isopo_mini.coursework.isolation import ORDINARY, counts_forks, has_namespaces

MASTERS = Path(isopo_mini.__file__).resolve().parent.parent / "coursework"


def main(given: list[str] | None = None) -> int:
    """Run one command; the exit status says whether it could be done."""
    parser = argparse.ArgumentParser(prog="python -m isopo_mini.coursework", description=__doc__)
    parser.add_argument("--masters", type=Path, default=MASTERS, help="default: coursework/ of the repository")
    commands = parser.add_subparsers(dest="command", required=True)
    student = commands.add_parser("student", help="write the repository that students get")
    student.add_argument("folder", type=Path, metavar="DIR")
    autograder = commands.add_parser("autograder", help="write the zip of each assignment for Gradescope")
    autograder.add_argument("folder", type=Path, metavar="DIR")
    grade = commands.add_parser("grade", help="grade a folder of submissions")
    grade.add_argument("folder", type=Path, metavar="DIR")
    grade.add_argument("out", type=Path, metavar="OUT")
    grade.add_argument("--call-seconds", type=float, default=ORDINARY.call_seconds, help="default: %(default)g")
    arguments = parser.parse_args(given)
    try:
        if arguments.command == "student":
            written = handing_out.write_student_repository(arguments.folder, arguments.masters)
            print(f"{arguments.folder}: {len(written)} assignments, README.md, requirements.txt and check.py")
        elif arguments.command == "autograder":
            for path in handing_out.write_autograders(arguments.folder, arguments.masters):
                print(path)
        else:
            if not has_namespaces():
                print("Without namespaces (unshare): submissions reach the network, and see every file that you see.")
            if not counts_forks():
                print("As root on this system, a submission that forks without end may take the machine down.")
            limits = dataclasses.replace(ORDINARY, call_seconds=arguments.call_seconds)
            table = grading.grade_folder(arguments.folder, arguments.out, arguments.masters, limits)
            print(table.drop(columns="graded").to_string(index=False, max_colwidth=60))
            print(f"{arguments.out / 'grades.csv'}, and Gradescope's JSON beside it")
    except ValueError as error:
        print(error)
        return 1
    except grading.NotStartedError as error:
        print(f"{error}\nNot the submission's fault. What was graded is kept; the same command goes on from there.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
