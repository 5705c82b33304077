# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of modules share."""

from __future__ import annotations

import json
from unittest import mock

import pytest
from ansible.module_utils import basic


@pytest.fixture
def run_module(capsys):
    """-> function(main, args, check=False) that runs a module in this process as Ansible would and returns its result.

    Everything the module prints is kept in ``run_module.output``, so that a test can search it for what must not be there.
    """

    def run(main, args, check=False, diff=True):
        arguments = dict(args, _ansible_check_mode=check, _ansible_diff=diff, _ansible_no_log=False, _ansible_remote_tmp="/tmp",
                         _ansible_keep_remote_files=False)
        data = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}).encode()
        # the profile is new in ansible-core 2.19; before, the attribute does not exist and nobody looks at it
        with mock.patch.object(basic, "_ANSIBLE_ARGS", data), mock.patch.object(basic, "_ANSIBLE_PROFILE", "legacy", create=True), \
                pytest.raises(SystemExit):
            main()
        printed = capsys.readouterr()
        run.output = printed.out + printed.err
        # where the controller's code is loaded as well, warnings are also printed, on stderr
        return json.loads(printed.out)

    run.output = ""
    return run
