/* The first process of a stock Linux guest of the lab, started by `init`: reads its tasks from the kernel's command line, starts
 * them, watches the clocks and the kernel's log, and prints a heartbeat each second. It never ends. */
#include "inside.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

struct figures figures;

uint64_t hash(uint64_t a, uint64_t b) {
    uint64_t x = a * 0xff51afd7ed558ccdULL ^ b * 0xc4ceb9fe1a85ec53ULL;
    x ^= x >> 32;
    x *= 0xff51afd7ed558ccdULL;
    return x ^ (x >> 29);
}

uint64_t now_ns(int clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

void sleep_ms(uint64_t ms) {
    struct timespec time = {.tv_sec = (time_t)(ms / 1000u), .tv_nsec = (long)(ms % 1000u) * 1000000L};
    nanosleep(&time, NULL);
}

void say(const char *format, ...) {
    static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
    char line[768];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length < 0)
        return;
    size_t bytes = (size_t)length < sizeof line - 1 ? (size_t)length : sizeof line - 2;
    line[bytes] = '\n';
    pthread_mutex_lock(&one);
    /* One write: the kernel's own lines do not come in between. */
    ssize_t unused = write(STDOUT_FILENO, line, bytes + 1);
    (void)unused;
    pthread_mutex_unlock(&one);
}

void start_thread(void *(*work)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, argument) != 0) {
        say("limosa-linux failed: no thread");
        return;
    }
    pthread_detach(thread);
}

/* One on each processor: no clock may show less than another processor's has shown before. */
static void *clock_watcher(void *argument) {
    static _Atomic uint64_t latest;
    cpu_set_t only;
    CPU_ZERO(&only);
    CPU_SET((size_t)(intptr_t)argument, &only);
    sched_setaffinity(0, sizeof only, &only);
    uint64_t before = now_ns(CLOCK_MONOTONIC);
    for (;;) {
        uint64_t seen = latest, now = now_ns(CLOCK_MONOTONIC);
        if (now < seen) {
            figures.clock_backwards++;
            say("limosa-linux bad clock: %llu ns back", (unsigned long long)(seen - now));
        }
        while (seen < now && !atomic_compare_exchange_weak(&latest, &seen, now))
            continue;
        uint64_t gap = (now - before) / 1000000u;
        if (now > before && gap > figures.clock_gap_ms_max)
            figures.clock_gap_ms_max = gap;
        before = now;
        sleep_ms(20);
    }
    return NULL;
}

/* The kernel's own warnings, and worse, are repeated with a mark. */
static void *log_watcher(void *unused) {
    (void)unused;
    int log = open("/dev/kmsg", O_RDONLY | O_CLOEXEC);
    char record[2048];
    while (log >= 0) {
        ssize_t length = read(log, record, sizeof record - 1);
        if (length <= 0) {
            if (errno != EPIPE)
                sleep_ms(200);
            continue;
        }
        record[length] = 0;
        char *text = strchr(record, ';'), *end = text ? strchr(text, '\n') : NULL;
        if (!text || (strtoul(record, NULL, 10) & 7u) > 4u)
            continue;
        if (end)
            *end = 0;
        figures.kernel_warnings++;
        say("limosa-linux kernel %lu %s", strtoul(record, NULL, 10) & 7u, text + 1);
    }
    return NULL;
}

/* A figure of the kernel's tables in /proc/net, which name their columns in one line and give them in the next. */
static uint64_t net_figure(const char *table, const char *group, const char *name) {
    char names[4096], values[4096];
    FILE *file = fopen(table, "re");
    uint64_t answer = 0;
    while (file && fgets(names, sizeof names, file) && fgets(values, sizeof values, file)) {
        if (strncmp(names, group, strlen(group)) != 0)
            continue;
        char *next_name, *next_value, *key = strtok_r(names, " \n", &next_name), *value = strtok_r(values, " \n", &next_value);
        for (; key && value; key = strtok_r(NULL, " \n", &next_name), value = strtok_r(NULL, " \n", &next_value))
            if (strcmp(key, name) == 0)
                answer = strtoull(value, NULL, 10);
    }
    if (file)
        fclose(file);
    return answer;
}

static void heartbeat(uint64_t n) {
    say("limosa-linux heartbeat n=%llu up_ms=%llu real_ms=%llu gap_ms_max=%llu backwards=%llu mem_written=%llu mem_walks=%llu "
        "mem_errors=%llu disk_seq=%llu disk_walks=%llu disk_errors=%llu files=%llu files_errors=%llu warnings=%llu sent=%llu "
        "received=%llu stream_errors=%llu tcp_timeouts=%llu tcp_retransmits=%llu",
        (unsigned long long)n, (unsigned long long)(now_ns(CLOCK_MONOTONIC) / 1000000u),
        (unsigned long long)(now_ns(CLOCK_REALTIME) / 1000000u), (unsigned long long)figures.clock_gap_ms_max,
        (unsigned long long)figures.clock_backwards, (unsigned long long)figures.memory_written,
        (unsigned long long)figures.memory_walks, (unsigned long long)figures.memory_errors, (unsigned long long)figures.disk_seq,
        (unsigned long long)figures.disk_walks, (unsigned long long)figures.disk_errors, (unsigned long long)figures.files_written,
        (unsigned long long)figures.files_errors, (unsigned long long)figures.kernel_warnings, (unsigned long long)figures.bytes_sent,
        (unsigned long long)figures.bytes_received, (unsigned long long)figures.stream_errors,
        (unsigned long long)net_figure("/proc/net/netstat", "TcpExt:", "TCPTimeouts"),
        (unsigned long long)net_figure("/proc/net/snmp", "Tcp:", "RetransSegs"));
}

/* The value of `key=` among the words of the kernel's command line; words end at blanks. */
static const char *task(const char *key) {
    static char line[4096];
    if (!line[0]) {
        FILE *file = fopen("/proc/cmdline", "re");
        if (!file || !fgets(line, sizeof line, file))
            return NULL;
        fclose(file);
    }
    char copy[4096], *next;
    strcpy(copy, line);
    for (char *word = strtok_r(copy, " \n", &next); word; word = strtok_r(NULL, " \n", &next))
        if (strncmp(word, key, strlen(key)) == 0)
            return strdup(word + strlen(key));
    return NULL;
}

static uint64_t number(const char *key, uint64_t otherwise) {
    const char *text = task(key);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

int main(void) {
    static struct memory_work memory;
    static struct disk_work disk;
    memory = (struct memory_work){.mib = number("lt.mem=", 0), .pages_per_second = number("lt.mem_rate=", 400)};
    disk = (struct disk_work){.path = task("lt.disk="), .mib = number("lt.disk_mib=", 1), .writes_per_second = number("lt.disk_rate=", 50)};
    const char *folder = task("lt.files=");
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    struct utsname name;
    uname(&name);
    start_thread(log_watcher, NULL);
    for (long cpu = 0; cpu < cpus; cpu++)
        start_thread(clock_watcher, (void *)(intptr_t)cpu);
    if (memory.mib > 0 && memory.pages_per_second > 0)
        start_thread(memory_writer, &memory);
    if (disk.path && disk.mib > 0 && disk.writes_per_second > 0)
        start_thread(disk_writer, &disk);
    if (folder)
        start_thread(file_writer, (void *)folder);
    start_thread(tcp_server, NULL);
    say("limosa-linux ready kernel=%s cpus=%ld", name.release, cpus);
    for (uint64_t n = 1;; n++) {
        sleep_ms(1000);
        heartbeat(n);
    }
}
