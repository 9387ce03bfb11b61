/* virtio-net over virtio-mmio version 2, polled: answers ARP, ICMP echo and UDP echo on port 7. Everything else is dropped. */
#include "guest.h"

enum { QUEUE = 32, BUFFER = 2048, HEADER = 12, FRAME_MAX = 1514 };
struct descriptor { u64 address; u32 length; u16 flags, next; };
struct queue {
    struct descriptor descriptors[QUEUE];
    struct { u16 flags, index, ring[QUEUE], event; } available;
    u8 pad[4096 - 16 * QUEUE - 2 * QUEUE - 6];
    struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE]; u16 event; } used;
} __attribute__((aligned(4096)));
#define NOINIT __attribute__((section(".noinit,\"aw\",@nobits#"), aligned(4096)))

static volatile struct queue rx, tx;
static u8 rx_buffers[QUEUE][BUFFER] NOINIT, tx_buffers[QUEUE][BUFFER] NOINIT;
static u8 tx_busy[QUEUE];
static u16 rx_seen, tx_seen;
static u32 device;

static u32 get(u32 offset) { return *(volatile u32 *)(device + offset); }
static void set(u32 offset, u32 v) { *(volatile u32 *)(device + offset) = v; }
static u32 be16(const u8 *p) { return p[0] << 8 | p[1]; }
static u32 same(const u8 *a, const u8 *b, u32 n) {
    while (n--)
        if (*a++ != *b++) return 0;
    return 1;
}
static void copy(u8 *to, const u8 *from, u32 n) {
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
}

static u32 queue_init(u32 n, volatile struct queue *q) {
    set(0x30, n);
    if (get(0x34) < QUEUE)
        return 0;
    set(0x38, QUEUE);
    set(0x80, (u32)q->descriptors); set(0x84, 0);
    set(0x90, (u32)&q->available); set(0x94, 0);
    set(0xa0, (u32)&q->used); set(0xa4, 0);
    q->available.flags = 1; /* no interrupts */
    set(0x44, 1);
    return 1;
}

void net_init(void) {
    u32 i;
    for (i = 0; i < config.mmio_count; i++) {
        device = config.mmio[i];
        if (get(0) == 0x74726976 && get(4) == 2 && get(8) == 1)
            break;
    }
    if (i == config.mmio_count)
        return;
    set(0x70, 0);
    set(0x70, 1);
    set(0x70, 3);
    set(0x14, 0);
    u32 mac = get(0x10) & 0x20;
    set(0x14, 1);
    u32 version1 = get(0x10) & 1;
    set(0x24, 0); set(0x20, mac);
    set(0x24, 1); set(0x20, version1);
    set(0x70, 11);
    if (!version1 || !mac || !(get(0x70) & 8) || !queue_init(0, &rx) || !queue_init(1, &tx)) {
        set(0x70, 0x80);
        return;
    }
    for (i = 0; i < 6; i++)
        report.mac[i] = *(volatile u8 *)(device + 0x100 + i);
    for (i = 0; i < QUEUE; i++) {
        rx.descriptors[i].address = (u32)rx_buffers[i];
        rx.descriptors[i].length = BUFFER;
        rx.descriptors[i].flags = 2; /* the device writes */
        rx.available.ring[i] = i;
        tx.descriptors[i].address = (u32)tx_buffers[i];
    }
    set(0x70, 15);
    barrier();
    rx.available.index = QUEUE;
    barrier();
    set(0x50, 0);
    report.net = 1;
}

/* Turns a frame that deserves an answer into that answer, in place; returns its length, or 0. */
static u32 answer(u8 *f, u32 n) {
    static const u8 arp_request[] = { 8, 6, 0, 1, 8, 0, 6, 4, 0, 1 };
    u8 t[4];
    if (n < 42)
        return 0;
    if (same(f + 12, arp_request, 10) && same(f + 38, config.ip, 4)) {
        f[21] = 2;
        copy(f + 32, f + 22, 10); /* the sender becomes the target */
        copy(f + 22, report.mac, 6);
        copy(f + 28, config.ip, 4);
        n = 42;
    } else {
        u32 total = be16(f + 16), header = (f[14] & 15) * 4, body = 14 + header;
        if (!same(f, report.mac, 6) || be16(f + 12) != 0x800 || f[14] >> 4 != 4 || header < 20 || total > n - 14
            || total < header + 8 || (be16(f + 20) & 0x3fff) || !same(f + 30, config.ip, 4))
            return 0;
        if (f[23] == 1 && f[body] == 8 && f[body + 1] == 0) {
            u32 sum = be16(f + body + 2) + 0x800; /* the type falls by 8, so the sum rises */
            sum = (sum & 0xffff) + (sum >> 16);
            f[body] = 0;
            f[body + 2] = sum >> 8;
            f[body + 3] = sum;
        } else if (f[23] == 17 && be16(f + body + 2) == 7 && be16(f + body + 4) >= 8 && be16(f + body + 4) <= total - header
                   && be16(f + body) != 7) { /* two echoes would talk for ever */
            copy(t, f + body, 2);
            copy(f + body, f + body + 2, 2);
            copy(f + body + 2, t, 2);
        } else
            return 0;
        copy(t, f + 26, 4); /* swapping leaves both checksums right */
        copy(f + 26, f + 30, 4);
        copy(f + 30, t, 4);
        n = 14 + total;
    }
    copy(f, f + 6, 6);
    copy(f + 6, report.mac, 6);
    return n;
}

static void send(const u8 *frame, u32 n) {
    u32 slot;
    while (tx_seen != tx.used.index) {
        u32 id = tx.used.ring[tx_seen++ % QUEUE].id;
        if (id < QUEUE)
            tx_busy[id] = 0;
    }
    for (slot = 0; slot < QUEUE && tx_busy[slot]; slot++) {}
    if (slot == QUEUE)
        return; /* full: dropped, as a network may */
    tx_busy[slot] = 1;
    for (u32 i = 0; i < HEADER; i++)
        tx_buffers[slot][i] = 0;
    copy(tx_buffers[slot] + HEADER, frame, n);
    tx.descriptors[slot].length = HEADER + n;
    tx.available.ring[tx.available.index % QUEUE] = slot;
    barrier();
    tx.available.index++;
    barrier();
    if (!(tx.used.flags & 1))
        set(0x50, 1);
    report.tx_packets++;
}

/* Handles at most 8 frames; returns how many there were. */
u32 net_poll(void) {
    u32 count = 0;
    for (; report.net && count < 8 && rx_seen != rx.used.index; count++) {
        barrier();
        u32 id = rx.used.ring[rx_seen % QUEUE].id, n = rx.used.ring[rx_seen % QUEUE].length;
        rx_seen++;
        if (id >= QUEUE)
            continue; /* the device's fault; that buffer is lost */
        report.rx_packets++;
        if (n > HEADER && n <= HEADER + FRAME_MAX && (n = answer(rx_buffers[id] + HEADER, n - HEADER)) != 0)
            send(rx_buffers[id] + HEADER, n);
        rx.available.ring[rx.available.index % QUEUE] = id;
        barrier();
        rx.available.index++;
    }
    if (count) {
        barrier();
        if (!(rx.used.flags & 1))
            set(0x50, 0);
    }
    return count;
}
