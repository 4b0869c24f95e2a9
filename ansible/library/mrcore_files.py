#!/usr/bin/python
"""Bring files, folders and links into the state that a role wants, in one call: each task is a round trip."""

from __future__ import annotations

import os
import shlex
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: mrcore_files
short_description: Bring files, folders and links into a wanted state in one call
description:
  - Does for a list what C(copy), C(file) and C(template) do for one path, and leaves alone what is as it should be.
  - Contents are compared as a whole, so that whatever somebody changed on the machine is put right again.
options:
  items:
    description: The paths, in the order in which they are brought into their state.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Where it is.
        type: path
        required: true
      state:
        description: What it is to be. Folders above a folder are made; nothing is removed from within one.
        type: str
        choices: [file, directory, link, absent]
        default: file
      content:
        description: The whole text of a file.
        type: str
      target:
        description: Where a link points, as it is to be written.
        type: str
      owner:
        description: Its owner; empty for whoever the task is.
        type: str
        default: root
      group:
        description: Its group; without it the owner's name.
        type: str
      mode:
        description: Its rights; without it C(0755) for folders, C(0644) for files.
        type: str
      validate:
        description: Command that judges a file before it takes its place; C(%s) stands for its path.
        type: str
      only_new:
        description: Leave alone what is there already, whatever its owner and rights are.
        type: bool
        default: false
author:
  - mrcore
"""
EXAMPLES = r"""
- name: Settings
  mrcore_files:
    items:
      - { path: /etc/mrcore, state: directory }
      - { path: /etc/mrcore/screenrc, content: "deflog off\n" }
      - { path: /opt/mrcore/current, state: link, target: releases/1.0.0 }
"""
RETURN = r"""
paths:
  description: What was changed, or would be in check mode.
  type: list
  elements: str
  returned: always
"""

Json = dict[str, Any]


def attributes(module: AnsibleModule, path: str, item: Json) -> Json:
    """Return owner, group and rights as Ansible's own functions take them."""
    is_folder = item["state"] == "directory"
    mode = None if item["state"] == "link" else item["mode"] or ("0755" if is_folder else "0644")
    owner = item["owner"] or None
    wanted = {"path": path, "owner": owner, "group": item["group"] or owner, "mode": mode}
    return dict(module.load_file_common_arguments(wanted))


def bring_directory(module: AnsibleModule, item: Json) -> bool:
    """Make a folder, and those above it that are missing; True when anything changed."""
    path, missing = item["path"], []
    if os.path.lexists(path) and not os.path.isdir(path):
        module.fail_json(msg=f"{path} is to be a folder and is something else: remove it there")
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    if module.check_mode and missing:
        return True
    for each in reversed(missing):
        os.mkdir(each)
        module.set_fs_attributes_if_different(attributes(module, each, item), False)
    if missing or item["only_new"]:
        return bool(missing)
    path = os.path.realpath(path)  # an operator may have put the data elsewhere
    return bool(module.set_fs_attributes_if_different(attributes(module, path, item), False))


def bring_file(module: AnsibleModule, item: Json, diff: list[Json]) -> bool:
    """Write a file unless it has this text, and set its rights; True when anything changed."""
    path, content = item["path"], (item["content"] or "").encode()
    if os.path.isdir(path):
        module.fail_json(msg=f"{path} is to be a file and is a folder: remove it there")
    present = None
    if os.path.exists(path) and not os.path.islink(path):
        with open(path, "rb") as stream:
            present = stream.read()
    changed = present != content
    if changed:
        before = (present or b"").decode(errors="replace")
        diff.append({"before": before, "after": item["content"], "before_header": path, "after_header": path})
        if module.check_mode:
            return True
        write(module, path, content, item["validate"])
    return bool(module.set_fs_attributes_if_different(attributes(module, path, item), changed))


def write(module: AnsibleModule, path: str, content: bytes, validate: str | None) -> None:
    """Put a file in place in one step, after its validation."""
    descriptor, temporary = tempfile.mkstemp(dir=module.tmpdir)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
    module.add_cleanup_file(temporary)
    if validate:
        status, output, errors = module.run_command(shlex.split(validate % shlex.quote(temporary)))
        if status:
            module.fail_json(msg=f"failed to validate {path}: {errors or output}", stdout=output, stderr=errors)
    module.atomic_move(temporary, path)


def bring_link(module: AnsibleModule, item: Json) -> bool:
    """Point a link, in one step: a program that is started meanwhile finds the one or the other."""
    path = item["path"]
    if os.path.lexists(path) and not os.path.islink(path):
        module.fail_json(msg=f"{path} is to be a link and is something else: remove it there")
    changed = not os.path.islink(path) or os.readlink(path) != item["target"]
    if changed and not module.check_mode:
        temporary = f"{path}.partial"
        if os.path.lexists(temporary):
            os.unlink(temporary)
        os.symlink(item["target"], temporary)
        os.replace(temporary, path)
    if changed and module.check_mode:
        return True
    return bool(module.set_fs_attributes_if_different(attributes(module, path, item), changed))


def bring_absent(module: AnsibleModule, item: Json) -> bool:
    """Remove a file or link; True when there was one."""
    there = os.path.lexists(item["path"])
    if there and not module.check_mode:
        os.unlink(item["path"])
    return there


def main() -> None:
    """Bring all items into their state, in their order."""
    text = {"type": "str"}
    options = {
        "path": {"type": "path", "required": True},
        "state": {"type": "str", "choices": ["file", "directory", "link", "absent"], "default": "file"},
        "owner": {"type": "str", "default": "root"},
        "only_new": {"type": "bool", "default": False},
    } | dict.fromkeys(("content", "target", "group", "mode", "validate"), text)
    needs = [("state", "file", ["content"]), ("state", "link", ["target"])]
    spec = {"items": {"type": "list", "elements": "dict", "required": True, "options": options, "required_if": needs}}
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    paths, diff = [], []  # type: ignore[var-annotated]
    for item in module.params["items"]:
        try:
            if item["state"] == "file":
                changed = bring_file(module, item, diff)
            else:
                changed = globals()[f"bring_{item['state']}"](module, item)
        except OSError as error:
            module.fail_json(msg=f"{item['path']}: {error.strerror or error}")
        if changed:
            paths.append(item["path"])
    module.exit_json(changed=bool(paths), paths=paths, diff=diff)


if __name__ == "__main__":
    main()
