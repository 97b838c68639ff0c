"""TDs: launch, Secure EPT, acceptance, a failing module."""
