"""Settings of all tests."""

import signal

from hypothesis import HealthCheck, settings

# Other work on the machine makes single examples slow now and then: that is no failure. The same examples in every run, so that
# a change breaks the tests if and only if it is wrong.
settings.register_profile("lctrain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lctrain")

# A shell that starts the suite in the background has it ignore SIGINT, and with it the programs that are to stop at one.
signal.signal(signal.SIGINT, signal.default_int_handler)
