# SPDX-License-Identifier: Apache-2.0
"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A bad flag, file or request.

    The message is one line that names the flag or file, says what is wrong and
    what to do. The ``kvserve`` command prints it alone and exits with 2.
    """
