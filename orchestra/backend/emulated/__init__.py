"""The emulated backend: guest code executed by unicorn, with no need of KVM."""
