"""List the branches of hub repositories into catalogs: ``python -m moescope.cataloguing [--configfile FILE] [repo]``.

Names and commits come with one request a repository, sizes with one a branch; no weights are fetched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moescope import catalog, config, files, hub
from moescope.errors import MoescopeError

#: Requests at a time: the hub counts them.
_AT_ONCE = 4


def rows(repo: str, progress: bool = False) -> list[dict[str, object]]:
    """The rows of a repository's catalog. Raises HubError where it cannot be listed."""
    from tqdm import tqdm

    commits = hub.branches(repo)

    def row(name: str) -> dict[str, object]:
        step, tokens_b = catalog.named(name)
        size = hub.weights_size(repo, commits[name])
        return {"step": step, "tokens_b": tokens_b, "revision": name, "commit": commits[name], "bytes": size}

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(tqdm(pool.map(row, commits), repo, len(commits), disable=not progress, unit=" branches"))


def model(repo: str, listed: list[dict[str, object]]) -> dict:
    """The configuration of a repository's model: that of its main branch, or of its last step."""
    commits = {row["revision"]: str(row["commit"]) for row in listed}
    last = max(listed, key=lambda row: row["step"] or 0, default=None)
    if last is None:
        raise hub.HubError(f"{repo}: has no branches; correct repo")
    return hub.config(repo, commits.get("main") or str(last["commit"]))


def repositories(configuration: dict) -> list[str]:
    """The hub repositories that a configuration names a series of."""
    series = config.effective(configuration)["series"]
    return sorted({entry["repo"] for entry in series if entry["source"] == "hub"})


def main(arguments: Iterable[str] | None = None) -> None:
    """Write the catalogs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configfile", nargs="+", action="extend", default=[], type=Path)
    parser.add_argument("repo", nargs="*", help="repositories, beside those that the configuration names")
    parser.add_argument("--directory", type=Path, default=Path(), help="of the run, as Snakemake takes it")
    options = parser.parse_args(arguments)
    try:
        repos = [*options.repo, *repositories(config.read_in(options.directory, options.configfile))]
        if not repos:
            raise MoescopeError("there is no series of the hub in the configuration; name its file with --configfile")
        for repo in dict.fromkeys(repos):
            path = Path(catalog.FOLDER) / catalog.file_name(repo)
            found = rows(repo, progress=sys.stderr.isatty())
            files.write_json(model(repo, found), path.with_suffix(".json"))
            catalog.write(found, path)
            print(
                f"{path}: {sum(row['step'] is not None for row in found)} of {len(found)} branches are training steps"
            )
    except MoescopeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
