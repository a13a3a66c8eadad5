"pytest -p emulated: tests run on the emulated GPU"
import emulate

def pytest_configure(config): config._emulator = emulate.install()
