"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# How long an example takes says nothing about what it shows, and a busy machine is no failure.
settings.register_profile("timeless", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")
