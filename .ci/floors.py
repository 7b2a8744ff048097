"""Every direct dependency of the installed vqflow at exactly its floor in pyproject.toml, one a line, for pip."""

from importlib.metadata import requires

for line in requires("vqflow") or ():
    requirement = line.partition(";")[0].strip()
    if not requirement.startswith("vqflow"):  # its own extras, which follow
        print(requirement.replace(">=", "=="))
