/* The library that executes guests. It is loaded when a vCPU first runs, and not preloaded: most processes of a client run
 * none, and a VMM may have symbols of the same names (QEMU has all of Unicorn's). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "vcpu.h"

struct library library;

struct symbol {
    const char *name;
    void **place;
};

static const struct symbol symbols[] = {
    {"cpu_space_create", (void **)&library.space_create},
    {"cpu_space_destroy", (void **)&library.space_destroy},
    {"cpu_space_map", (void **)&library.space_map},
    {"cpu_space_map_mmio", (void **)&library.space_map_mmio},
    {"cpu_space_drop", (void **)&library.space_drop},
    {"cpu_create", (void **)&library.create},
    {"cpu_destroy", (void **)&library.destroy},
    {"cpu_last_error", (void **)&library.last_error},
    {"cpu_run", (void **)&library.run},
    {"cpu_settle", (void **)&library.settle},
    {"cpu_kick", (void **)&library.kick},
    {"cpu_takes_interrupts", (void **)&library.takes_interrupts},
    {"cpu_set_mode", (void **)&library.set_mode},
    {"cpu_watch_signals", (void **)&library.watch_signals},
    {"cpu_handle_fault", (void **)&library.handle_fault},
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool loaded; /* by `lock`, and read without it once true */

static bool resolve(void *handle)
{
    for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++)
        if (!(*symbols[i].place = dlsym(handle, symbols[i].name)))
            return false;
    return true;
}

static bool load(const char *path, enum cpu_mode mode)
{
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle || !resolve(handle)) {
        dprintf(2, "guestmem: no vCPU can run in this process: %s\n", dlerror());
        return false;
    }
    library.set_mode(mode);
    return true;
}

bool library_load(const char *path, enum cpu_mode mode)
{
    if (__atomic_load_n(&loaded, __ATOMIC_ACQUIRE))
        return true;
    pthread_mutex_lock(&lock);
    if (!loaded && load(path, mode))
        __atomic_store_n(&loaded, true, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
    return loaded;
}
