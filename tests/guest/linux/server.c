/* The TCP server: one line of request a connection. `stream RATE`: bytes that the peer can prove, RATE a second, until it closes its
 * half or sends "stop", then the end. `sink`: takes such bytes until the peer's end and answers how many were right.
 * `time`: the clocks. */
#include "inside.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PORT 8080
#define STREAM_SEED 0x11

static bool send_all(int peer, const char *bytes, size_t length) {
    while (length > 0) {
        ssize_t sent = send(peer, bytes, length, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return false;
        bytes += sent;
        length -= (size_t)sent;
    }
    return true;
}

static void stream(int peer, uint64_t rate) {
    enum { CHUNK = 8192 };
    static _Thread_local uint64_t words[CHUNK / 8];
    uint64_t word = 0, start = now_ns(CLOCK_MONOTONIC), sent = 0;
    struct pollfd wish = {.fd = peer, .events = POLLIN};
    while (poll(&wish, 1, 0) == 0) {
        for (size_t i = 0; i < CHUNK / 8; i++)
            words[i] = word_of(STREAM_SEED, word++);
        if (!send_all(peer, (const char *)words, CHUNK)) {
            figures.stream_errors++;
            say("limosa-linux stream broke after %llu bytes: %s", (unsigned long long)sent, strerror(errno));
            return;
        }
        sent += CHUNK;
        figures.bytes_sent += CHUNK;
        uint64_t due = start + sent * 1000000000u / rate, now = now_ns(CLOCK_MONOTONIC);
        if (due > now)
            sleep_ms((due - now) / 1000000u);
        else
            start += now - due;
    }
    shutdown(peer, SHUT_WR);
    struct tcp_info info = {0};
    socklen_t length = sizeof info;
    getsockopt(peer, IPPROTO_TCP, TCP_INFO, &info, &length);
    say("limosa-linux stream done bytes=%llu retransmitted=%u", (unsigned long long)sent, info.tcpi_total_retrans);
    char rest[256];
    while (recv(peer, rest, sizeof rest, 0) > 0)
        continue;
}

static void sink(int peer) {
    static _Thread_local unsigned char bytes[16384];
    uint64_t count = 0, wrong = 0;
    for (ssize_t got; (got = recv(peer, bytes, sizeof bytes, 0)) > 0;) {
        for (ssize_t i = 0; i < got; i++, count++)
            wrong += bytes[i] != (unsigned char)(word_of(STREAM_SEED, count / 8) >> (count % 8 * 8));
        figures.bytes_received += (uint64_t)got;
    }
    char answer[96];
    int length = snprintf(answer, sizeof answer, "bytes=%llu wrong=%llu\n", (unsigned long long)count, (unsigned long long)wrong);
    send_all(peer, answer, (size_t)length);
    figures.stream_errors += wrong > 0;
}

static void *converse(void *argument) {
    int peer = (int)(intptr_t)argument;
    char line[128] = {0};
    size_t length = 0;
    while (length + 1 < sizeof line && recv(peer, line + length, 1, 0) == 1 && line[length] != '\n')
        length++;
    unsigned long long rate;
    if (sscanf(line, "stream %llu", &rate) == 1 && rate > 0) {
        stream(peer, rate);
    } else if (strncmp(line, "sink", 4) == 0) {
        sink(peer);
    } else if (strncmp(line, "time", 4) == 0) {
        char answer[96];
        int bytes = snprintf(answer, sizeof answer, "monotonic_ns=%llu realtime_ns=%llu\n",
                             (unsigned long long)now_ns(CLOCK_MONOTONIC), (unsigned long long)now_ns(CLOCK_REALTIME));
        send_all(peer, answer, (size_t)bytes);
    }
    close(peer);
    return NULL;
}

void *tcp_server(void *unused) {
    (void)unused;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(PORT), .sin_addr.s_addr = htonl(INADDR_ANY)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 16) != 0) {
        say("limosa-linux failed: cannot listen on port %d: %s", PORT, strerror(errno));
        return NULL;
    }
    for (;;) {
        int peer = accept(listener, NULL, NULL);
        if (peer >= 0)
            start_thread(converse, (void *)(intptr_t)peer);
        else
            sleep_ms(100);
    }
}
