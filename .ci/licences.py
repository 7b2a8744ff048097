"""Prints a table of what is installed here: package, version and licence, as each package says itself."""

from importlib.metadata import Distribution, distributions

UNKNOWN = "not said"
LONGEST = 60  # some packages have the whole text where its name should be


def licence(package: Distribution) -> str:
    """The SPDX expression, else the classifiers, else the first line of the older field."""
    facts = package.metadata
    classes = [c.split(" :: ")[-1] for c in facts.get_all("Classifier") or [] if c.startswith("License :: ")]
    named = [c for c in classes if c != "OSI Approved"]
    older = (facts.get("License") or "").strip().splitlines()
    found = facts.get("License-Expression") or ", ".join(named) or (older[0][:LONGEST] if older else "")
    return UNKNOWN if found in ("", "UNKNOWN") else found


def table(packages: list[Distribution]) -> str:
    """Markdown, by name."""
    rows = {p.metadata["Name"]: f"| {p.metadata['Name']} | {p.version} | {licence(p)} |" for p in packages}
    lines = [rows[name] for name in sorted(rows, key=str.casefold)]
    return "\n".join(["| package | version | licence |", "|---|---|---|", *lines])


if __name__ == "__main__":
    print(table(list(distributions())))
