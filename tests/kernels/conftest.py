# SPDX-License-Identifier: Apache-2.0
"""Property tests try the same cases in every run, however slow the machine."""

from hypothesis import settings

settings.load_profile("ci")
