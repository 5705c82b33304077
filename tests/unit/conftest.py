# -*- coding: utf-8 -*-
# Copyright (c) 2026, Kubemesh contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What all unit tests share: property tests that judge results, never the speed of the machine."""

from __future__ import annotations

import os

import hypothesis

hypothesis.settings.register_profile(
    "collection",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
    # The same examples in every run of the CI: what it reports must be the change's doing. Elsewhere new ones are looked for.
    derandomize=bool(os.environ.get("CI")),
)
# Run by ansible-test, on other versions of Python, fewer examples: they look for what those do differently, the search is done elsewhere.
hypothesis.settings.register_profile("version", hypothesis.settings.get_profile("collection"), max_examples=10)
hypothesis.settings.load_profile("version" if "ansible_pytest" in os.environ.get("PYTEST_PLUGINS", "") else "collection")
