"""The commit that made a result."""

import subprocess

from semisparse_lab import provenance


def test_commit_reads_git_and_marks_changes(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "lab" / "src" / "semisparse_lab" / "provenance.py"))
    assert provenance.commit() == head
    (tmp_path / "new").touch()
    assert provenance.commit() == f"{head}+changes"


def test_commit_is_that_of_the_source_tree_or_nothing(monkeypatch, tmp_path):
    installed = tmp_path / "lib" / "site-packages" / "semisparse_lab" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.commit() is None
