"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# Other work on the machine makes single examples slow now and then: that is no failure. The same examples in every run, so that
# a change breaks the tests if and only if it is wrong.
settings.register_profile("lctrain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lctrain")
